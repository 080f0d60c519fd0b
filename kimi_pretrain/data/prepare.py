"""Text to Megatron's token files: parts by workers in parallel, then one ordered merge.

Every unit of input becomes a part file (``parts.py``), in any order, on any number of
processes. When all are there, each domain is written in the order of its input: duplicates
left out, held-out documents apart. A run that is killed goes on with the parts it has; the
bytes written depend on input, tokenizer and options alone.
"""

import hashlib
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import TokenizerConfig
from kimi_pretrain.data import manifest as manifests
from kimi_pretrain.data.documents import Defect, Unit
from kimi_pretrain.data.lock import exclusive
from kimi_pretrain.data.manifest import DomainRecord, Manifest, SourceRecord, TokenizerRecord
from kimi_pretrain.data.merge import merge
from kimi_pretrain.data.parts import part_name
from kimi_pretrain.data.progress import Progress, silent
from kimi_pretrain.data.tokenizer_protocol import Tokenizer
from kimi_pretrain.data.tokenizers import FILE_KINDS, load_tokenizer
from kimi_pretrain.data.workers import Job, available_cores, run_jobs

DEDUP = ("exact", "whitespace", "none")
WORK = ".prepare"  # directory of a corpus that holds unfinished work and locks


@dataclass(frozen=True)
class Options:
    """How documents are chosen; the manifest records it.

    heldout: share of the documents held out, chosen by a hash of their content, so a
    document stays on its side when others come or go. dedup: "exact", "whitespace"
    (documents that differ in white space only are one) or "none". skip_bad_input: count
    what cannot be read and go on, instead of refusing.
    """

    heldout: float = 0.01
    dedup: str = "exact"
    skip_bad_input: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.heldout < 1:
            raise ConfigError(
                "held-out share", self.heldout, "it is a share of the documents in [0, 1)", "0.01"
            )
        if self.dedup not in DEDUP:
            raise ConfigError("dedup", self.dedup, f"it is one of {', '.join(DEDUP)}", "exact")


@dataclass(frozen=True)
class DomainInput:
    """What goes into one domain, and the licence of each source that its units name."""

    units: Sequence[Unit]
    licenses: Mapping[str, str]
    ignored_files: int = 0


class BadInputError(ConfigError):
    """Input that gives no documents; ``defects`` are the first of ``count``."""

    def __init__(self, defects: Sequence[Defect], count: int) -> None:
        first = defects[0]
        super().__init__(first.what, first.value, first.rule, first.fix)
        self.defects = defects
        self.count = count


def prepare(
    corpus: Path,
    domains: Mapping[str, DomainInput],
    tokenizer: TokenizerConfig,
    options: Options,
    workers: int | None = None,
    progress: Progress = silent,
) -> Manifest:
    """Tokenise domains into ``corpus`` and record them in its manifest.

    A relative ``tokenizer.path`` starts at ``corpus``. Other domains of the corpus stay, and
    a domain that is done already, from the same input, is left as it is. ``workers``
    defaults to the cores this process may use; the output does not depend on it.

    Raises BadInputError, when every other unit is done, if units have defects and options do
    not skip them; ConfigError if the corpus was made with another tokenizer, if another
    process prepares one of the domains, or if a worker dies.
    """
    loaded = load_tokenizer(tokenizer, corpus)
    with ExitStack() as stack:
        for name in domains:
            _claim(corpus, name, stack)
        record = _keep_tokenizer(corpus, tokenizer, loaded)
        jobs = {
            name: _jobs(corpus, name, domain, record, options) for name, domain in domains.items()
        }
        todo = {
            name: listed
            for name, listed in jobs.items()
            if not _done(corpus, name, listed, options)
        }
        absolute = replace(tokenizer, path=record.file and str((corpus / record.file).absolute()))
        _encode(
            [job for listed in todo.values() for job in listed],
            absolute,
            options,
            workers or available_cores(),
            progress,
        )
        for name, listed in todo.items():
            # While its files change, the manifest must not vouch for the domain.
            _record(corpus, record, name, None)
            parts = [(job.unit.source, job.path) for job in listed]
            dedup = options.dedup != "none"
            merged = merge(corpus, name, parts, loaded.vocab_size, dedup, options.heldout, progress)
            licenses = domains[name].licenses
            domain = DomainRecord(
                train=merged.files["train"],
                heldout=merged.files.get("heldout"),
                sources={
                    source: SourceRecord(licenses[source], *counts)
                    for source, counts in merged.sources.items()
                },
                input=replace(merged.input, ignored_files=domains[name].ignored_files),
                options=asdict(options),
            )
            _record(corpus, record, name, domain)
            _done_file(corpus, name).write_text(_state(listed, options), encoding="ascii")
        for name in domains:
            shutil.rmtree(corpus / WORK / name)
    return manifests.read(corpus)


def _claim(corpus: Path, name: str, stack: ExitStack) -> None:
    if not stack.enter_context(exclusive(corpus / WORK / f"{name}.lock", wait=False)):
        raise ConfigError(
            "domain to prepare",
            str(corpus / "train" / name),
            "one process at a time may prepare it, and another one does",
            "to wait, or another domain",
        )
    (corpus / WORK / name).mkdir(exist_ok=True)


def _keep_tokenizer(corpus: Path, cfg: TokenizerConfig, loaded: Tokenizer) -> TokenizerRecord:
    """Copy the tokenizer's file into the corpus; refuse one that differs from the corpus's own."""
    file = f"tokenizer/{FILE_KINDS[cfg.kind][0]}" if cfg.kind in FILE_KINDS else None
    record = TokenizerRecord(cfg.kind, loaded.fingerprint(), loaded.vocab_size, loaded.eod_id, file)
    if (corpus / manifests.FILE_NAME).exists():
        known = manifests.read(corpus).tokenizer
        if known.fingerprint != record.fingerprint:
            raise ConfigError(
                f"tokenizer for the corpus {corpus}",
                f"{record.kind} {record.fingerprint[:12]}",
                f"its domains use {known.kind} {known.fingerprint[:12]}",
                "another directory, or the corpus's own tokenizer",
            )
    if file is not None and cfg.path is not None:
        source = corpus / Path(cfg.path).expanduser()
        source = source / Path(file).name if source.is_dir() else source
        target = corpus / file
        if not (target.exists() and target.samefile(source)):
            target.parent.mkdir(exist_ok=True)
            temporary = target.with_suffix(f".{os.getpid()}")
            shutil.copyfile(source, temporary)
            temporary.replace(target)
    return record


def _jobs(
    corpus: Path, name: str, domain: DomainInput, tokenizer: TokenizerRecord, options: Options
) -> list[Job]:
    folder = corpus / WORK / name
    return [
        Job(
            unit,
            folder / part_name(unit, tokenizer.fingerprint, options.dedup, options.skip_bad_input),
            options.dedup,
            options.skip_bad_input,
        )
        for unit in domain.units
    ]


def _encode(
    jobs: Sequence[Job],
    tokenizer: TokenizerConfig,
    options: Options,
    workers: int,
    progress: Progress,
) -> None:
    total = sum(job.unit.size for job in jobs)
    todo = [job for job in jobs if not job.path.exists()]
    done = total - sum(job.unit.size for job in todo)
    defects: list[Defect] = []
    count = 0
    progress("tokenize", done, total)
    for job, outcome in run_jobs(todo, tokenizer, workers):
        defects.extend(outcome.defects)
        count += outcome.count
        done += job.unit.size
        progress("tokenize", done, total)
    if count and not options.skip_bad_input:
        raise BadInputError(defects, count)


def _record(
    corpus: Path, tokenizer: TokenizerRecord, name: str, domain: DomainRecord | None
) -> None:
    """Put a domain into the manifest, in order of names, or take it out."""
    with exclusive(corpus / WORK / "manifest.lock"):
        old = Manifest(tokenizer, {})
        if (corpus / manifests.FILE_NAME).exists():
            old = manifests.read(corpus)
        domains = {key: value for key, value in old.domains.items() if key != name}
        if domain is not None:
            domains[name] = domain
        manifests.write(corpus, replace(old, domains=dict(sorted(domains.items()))))


def _done(corpus: Path, name: str, jobs: Sequence[Job], options: Options) -> bool:
    """Whether the domain was prepared from exactly this input before."""
    manifest, file = corpus / manifests.FILE_NAME, _done_file(corpus, name)
    if not (manifest.exists() and file.exists() and name in manifests.read(corpus).domains):
        return False
    return file.read_text(encoding="ascii") == _state(jobs, options)


def _done_file(corpus: Path, name: str) -> Path:
    return corpus / WORK / f"{name}.done"


def _state(jobs: Sequence[Job], options: Options) -> str:
    content = repr(([job.path.name for job in jobs], options))
    return hashlib.sha256(content.encode()).hexdigest()
