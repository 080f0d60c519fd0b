"""The corpus a run reads: built on first use from a recipe, or opened where it lies."""

import hashlib
import json
import multiprocessing
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.nearest import nearest_name
from kimi_pretrain.config.schema import DataConfig, TokenizerConfig
from kimi_pretrain.data import manifest as manifests
from kimi_pretrain.data.indexed import bin_path, idx_path
from kimi_pretrain.data.lock import exclusive
from kimi_pretrain.data.manifest import Manifest
from kimi_pretrain.data.prepare import WORK, prepare
from kimi_pretrain.data.prepared import DomainFiles, PreparedData
from kimi_pretrain.data.progress import Progress, silent
from kimi_pretrain.data.recipes import RECIPES, Recipe
from kimi_pretrain.data.sample import train_bpe
from kimi_pretrain.data.tokenizers import DEFAULT_VOCABULARY, FILE_KINDS, check_kind, load_tokenizer


def ensure(cfg: DataConfig, progress: Progress = silent) -> PreparedData:
    """Open the corpus of a configuration, building its recipe's first where it is absent.

    A recipe's corpus lies in ``<root>/<recipe>-<key>``; the key is a hash of the recipe's
    version, the tokenizer, and the versions of Python and the packages it reads, and equal
    keys mean equal bytes. It is built in a directory of its own and appears in one step; a
    second process waits for the first, and a build that was killed goes on where it was.

    Without a recipe, ``cfg.domains`` name prefixes of token files, relative to ``cfg.root``.

    Raises ConfigError for an unknown recipe, absent files (with the nearest prefix that
    exists), and a tokenizer other than the one the files were made with.
    """
    root = _root(cfg)
    if cfg.recipe is None:
        return _open_files(cfg, root)
    if cfg.domains:
        raise ConfigError(
            "data.domains",
            ", ".join(cfg.domains),
            f"the recipe {cfg.recipe!r} brings its own domains",
            "data.recipe=null, or no domains",
        )
    if cfg.recipe not in RECIPES:
        raise ConfigError(
            "data.recipe",
            cfg.recipe,
            f"it is one of {', '.join(RECIPES)}, or null",
            nearest_name(cfg.recipe, RECIPES),
        )
    recipe = RECIPES[cfg.recipe]
    corpus = root / directory_name(recipe, cfg.tokenizer, root)
    if not (corpus / manifests.FILE_NAME).exists():
        _build_once(corpus, recipe, cfg.tokenizer, progress)
    return open_corpus(corpus)


def open_corpus(corpus: Path) -> PreparedData:
    """Open a prepared corpus by its directory, with the tokenizer it keeps.

    Raises ConfigError if the manifest or a file is absent, or the tokenizer's file changed.
    """
    manifest = manifests.read(corpus)
    record = manifest.tokenizer
    tokenizer = load_tokenizer(TokenizerConfig(record.kind, record.file), corpus)
    _check_fingerprint(tokenizer.fingerprint(), manifest, corpus)
    domains = {
        name: DomainFiles(
            corpus / domain.train.prefix,
            None if domain.heldout is None else corpus / domain.heldout.prefix,
        )
        for name, domain in manifest.domains.items()
    }
    return PreparedData(tokenizer, domains)


def directory_name(recipe: Recipe, tokenizer: TokenizerConfig, root: Path) -> str:
    """Name of the directory of a recipe's corpus; a relative tokenizer path starts at root.

    Raises ConfigError for a tokenizer that does not exist.
    """
    check_kind(tokenizer.kind)
    if _trained_here(tokenizer):
        identity = f"bpe of {tokenizer.vocab_size or DEFAULT_VOCABULARY}"
    else:
        identity = load_tokenizer(tokenizer, root).fingerprint()
    content = json.dumps([recipe.name, recipe.version, identity, recipe.state()])
    return f"{recipe.name}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def _root(cfg: DataConfig) -> Path:
    try:
        return Path(cfg.root).expanduser()
    except RuntimeError as error:
        rule = "it begins with ~, and this user has no home directory"
        raise ConfigError("data.root", cfg.root, rule, "data.root=DIR or KIMI_DATA=DIR") from error


def _trained_here(tokenizer: TokenizerConfig) -> bool:
    return tokenizer.kind == "bpe" and tokenizer.path is None


def _build_once(
    corpus: Path, recipe: Recipe, tokenizer: TokenizerConfig, progress: Progress
) -> None:
    _require_main_guard()
    lock = corpus.parent / f".{corpus.name}.lock"
    with exclusive(lock, wait=False) as first:
        if first:
            _build(corpus, recipe, tokenizer, progress)
            return
    progress(f"wait for another process to build {corpus.name}", 0, 1)
    with exclusive(lock):
        _build(corpus, recipe, tokenizer, progress)


def _require_main_guard() -> None:
    """Refuse to build while a worker is still importing the script that started it.

    Workers are spawned, and import the caller's script again. Without a main guard that
    script would come here once more in the worker and wait for its own parent's lock.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise RuntimeError(
            "a corpus is built by worker processes that import your script again; call ensure "
            'below `if __name__ == "__main__":`'
        )


def _build(corpus: Path, recipe: Recipe, tokenizer: TokenizerConfig, progress: Progress) -> None:
    """Build under the lock, in a hidden directory that a later call can go on with."""
    if (corpus / manifests.FILE_NAME).exists():
        return

    def told(stage: str, done: int, total: int) -> None:
        progress(f"{recipe.name} corpus: {stage}", done, total)

    partial = corpus.parent / f".{corpus.name}.partial"
    domains = recipe.collect()
    options = recipe.options
    if _trained_here(tokenizer):
        file = partial / "tokenizer" / FILE_KINDS["bpe"][0]
        if not file.exists():
            train_bpe(
                file,
                {name: domain.units for name, domain in domains.items()},
                recipe.sample_bytes,
                tokenizer.vocab_size or DEFAULT_VOCABULARY,
                options.heldout,
                options.dedup,
                told,
            )
        tokenizer = replace(tokenizer, path=str(file.absolute()))
    elif tokenizer.path is not None:
        path = corpus.parent / Path(tokenizer.path).expanduser()
        tokenizer = replace(tokenizer, path=str(path.absolute()))
    manifest = prepare(partial, domains, tokenizer, options, progress=told)
    identity = {"name": recipe.name, "version": recipe.version}
    manifests.write(partial, replace(manifest, recipe=identity))
    shutil.rmtree(partial / WORK)
    partial.rename(corpus)


def _open_files(cfg: DataConfig, root: Path) -> PreparedData:
    if not cfg.domains:
        raise ConfigError(
            "data.domains",
            "none",
            "without a recipe, domains must name their token files",
            f"data.recipe={next(iter(RECIPES))}, or data.domains.<name>.train=<prefix>",
        )
    domains = {
        name: DomainFiles(
            _existing(root, name, domain.train),
            None if domain.heldout is None else _existing(root, name, domain.heldout),
        )
        for name, domain in cfg.domains.items()
    }
    prefixes = [prefix for files in domains.values() for prefix in (files.train, files.heldout)]
    found = {prefix: manifests.find(prefix) for prefix in prefixes if prefix is not None}
    tokenizer = load_tokenizer(*_tokenizer_file(cfg.tokenizer, root, found))
    for known in found.values():
        if known is not None:
            _check_fingerprint(tokenizer.fingerprint(), known[1], known[0])
    return PreparedData(tokenizer, domains)


def _tokenizer_file(
    cfg: TokenizerConfig, root: Path, found: Mapping[Path, tuple[Path, Manifest] | None]
) -> tuple[TokenizerConfig, Path]:
    """The configured tokenizer, and the directory its path starts at.

    A kind without a path means the copy that the corpus itself keeps.
    """
    if cfg.path is None and cfg.kind in FILE_KINDS:
        for known in found.values():
            if known is not None and known[1].tokenizer.kind == cfg.kind:
                return replace(cfg, path=known[1].tokenizer.file), known[0]
    return cfg, root


def _check_fingerprint(fingerprint: str, manifest: Manifest, corpus: Path) -> None:
    record = manifest.tokenizer
    if fingerprint != record.fingerprint:
        raise ConfigError(
            "tokenizer",
            fingerprint[:12],
            f"the tokens of {corpus} were made by {record.kind} {record.fingerprint[:12]}",
            f"data.tokenizer.kind={record.kind}"
            + (f" data.tokenizer.path={corpus / record.file}" if record.file else ""),
        )


def _existing(root: Path, domain: str, configured: str) -> Path:
    prefix = root / Path(configured).expanduser()
    missing = [path for path in (bin_path(prefix), idx_path(prefix)) if not path.is_file()]
    if not missing:
        return prefix
    raise ConfigError(
        f"token files of domain {domain!r}",
        str(missing[0]),
        "<prefix>.bin and <prefix>.idx must both exist",
        _nearest(prefix, root),
    )


def _nearest(prefix: Path, root: Path) -> str:
    """The prefix with files that looks most like the one asked for."""
    folder = next((path for path in prefix.parents if path.is_dir()), root)
    depths = ("*.idx", "*/*.idx", "*/*/*.idx")
    present = [str(path.with_suffix("")) for depth in depths for path in folder.glob(depth)]
    if present:
        return nearest_name(str(prefix), present)
    return "kimi-pretrain data prepare, which writes such files"
