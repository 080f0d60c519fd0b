"""`kimi-pretrain data prepare | verify | stats | index`."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import DataConfig, TokenizerConfig
from kimi_pretrain.data import corpus as corpora
from kimi_pretrain.data import manifest as manifests
from kimi_pretrain.data.index_files import merge_files, rebuild_index
from kimi_pretrain.data.prepare import DEDUP, BadInputError, DomainInput, Options, prepare
from kimi_pretrain.data.progress import Progress, console
from kimi_pretrain.data.recipes import RECIPES
from kimi_pretrain.data.sample import train_bpe
from kimi_pretrain.data.sources import FORMATS, plan
from kimi_pretrain.data.stats import corpus_lines, prefix_lines
from kimi_pretrain.data.tokenizers import DEFAULT_VOCABULARY, FILE_KINDS, check_kind
from kimi_pretrain.data.verify import verify

DONE, BAD_INPUT = 0, 2
SAMPLE_BYTES = 64_000_000  # of the input, for a BPE trained here


def main(argv: Sequence[str]) -> int:
    """Run one data command; returns the exit code, 2 for bad input and after any defect."""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as error:  # argparse has said what is wrong, or shown the help
        return DONE if error.code in (None, 0) else BAD_INPUT
    try:
        run: Callable[[argparse.Namespace], int] = arguments.run
        return run(arguments)
    except BadInputError as error:
        for defect in error.defects:
            _refuse(str(defect.error()))
        _refuse(f"{error.count} defects; what is finished is kept, run again to go on")
    except ConfigError as error:
        _refuse(str(error))
    except OSError as error:
        _refuse(f"{error.filename or 'input or output'}: {error.strerror or error}")
    return BAD_INPUT


def _prepare(arguments: argparse.Namespace) -> int:
    tokenizer = _tokenizer(arguments.tokenizer, arguments.vocab_size)
    corpus: Path = arguments.output
    with console() as progress:
        if arguments.recipe is not None:
            corpus = _prepare_recipe(arguments, tokenizer, progress)
        else:
            _prepare_inputs(arguments, tokenizer, progress)
    _show(corpus_lines(corpus))
    return DONE


def _prepare_recipe(
    arguments: argparse.Namespace, tokenizer: TokenizerConfig, progress: Progress
) -> Path:
    if arguments.inputs:
        raise ConfigError(
            "input", arguments.inputs[0], "a recipe finds its own input", "no paths with --recipe"
        )
    root = arguments.output
    corpora.ensure(
        DataConfig(
            name=arguments.recipe, root=str(root), recipe=arguments.recipe, tokenizer=tokenizer
        ),
        progress,
    )
    return Path(root) / corpora.directory_name(RECIPES[arguments.recipe], tokenizer, root)


def _prepare_inputs(
    arguments: argparse.Namespace, tokenizer: TokenizerConfig, progress: Progress
) -> None:
    name, corpus = arguments.domain, arguments.output
    if not arguments.inputs:
        raise ConfigError("input", "nothing", "name at least one file or directory", "--recipe")
    if not name.replace("-", "").replace("_", "").isalnum():
        raise ConfigError(
            "--domain", name, "a name has letters, digits, - and _ only", "--domain text"
        )
    options = Options(arguments.heldout, arguments.dedup, arguments.bad_input == "skip")
    source = arguments.source or ", ".join(path.resolve().name for path in arguments.inputs)
    units, ignored = plan(arguments.inputs, arguments.text_field, arguments.format, source)
    if not units:
        raise ConfigError(
            "input",
            source,
            "its directories hold no file whose suffix is known",
            f"--format {' or '.join(FORMATS)}",
        )
    if tokenizer.kind == "bpe" and tokenizer.path is None:
        file = corpus / "tokenizer" / FILE_KINDS["bpe"][0]
        # An earlier run, of this domain or another, may have trained it.
        if not file.exists():
            sizes = {name: min(SAMPLE_BYTES, sum(unit.size for unit in units))}
            vocabulary = tokenizer.vocab_size or DEFAULT_VOCABULARY
            train_bpe(
                file, {name: units}, sizes, vocabulary, options.heldout, options.dedup, progress
            )
        tokenizer = TokenizerConfig("bpe", str(file.absolute()), tokenizer.vocab_size)
    domain = DomainInput(units, {source: arguments.license}, ignored)
    prepare(corpus, {name: domain}, tokenizer, options, arguments.workers, progress)


def _tokenizer(text: str, vocab_size: int | None) -> TokenizerConfig:
    """`kind` or `kind:path` as a configuration; the path starts where the user stands."""
    kind, _, path = text.partition(":")
    check_kind(kind)
    if kind == "tiktoken" and not path:
        raise ConfigError("--tokenizer", text, "tiktoken reads a file", "--tokenizer tiktoken:PATH")
    if kind == "bytes" and path:
        raise ConfigError("--tokenizer", text, "bytes read no file", "--tokenizer bytes")
    if vocab_size is not None and (kind != "bpe" or path):
        raise ConfigError(
            "--vocab-size", vocab_size, "it is for a BPE trained here", "--tokenizer bpe"
        )
    return TokenizerConfig(
        kind, str(Path(path).expanduser().absolute()) if path else None, vocab_size
    )


def _verify(arguments: argparse.Namespace) -> int:
    with console() as progress:
        defects = [defect for path in arguments.paths for defect in verify(path, progress)]
    for defect in defects:
        _complain(defect)
    if not defects:
        print(f"{', '.join(map(str, arguments.paths))}: no defect")
    return BAD_INPUT if defects else DONE


def _stats(arguments: argparse.Namespace) -> int:
    for path in arguments.paths:
        corpora_below = sorted(entry.parent for entry in path.glob(f"*/{manifests.FILE_NAME}"))
        if (path / manifests.FILE_NAME).exists() or not corpora_below:
            _show(corpus_lines(path))
        else:
            for corpus in corpora_below:
                _show(corpus_lines(corpus))
                print()
    return DONE


def _index(arguments: argparse.Namespace) -> int:
    if arguments.merge:
        if arguments.output is None:
            raise ConfigError("--output", None, "--merge writes a new prefix", "-o PREFIX")
        merge_files(arguments.prefixes, arguments.output)
        prefixes = [arguments.output]
    elif arguments.rebuild:
        if arguments.eod is None:
            raise ConfigError(
                "--eod", None, "--rebuild cuts documents behind this token id", "--eod ID"
            )
        for prefix in arguments.prefixes:
            rebuild_index(prefix, np.dtype(arguments.dtype).newbyteorder("<"), arguments.eod)
        prefixes = arguments.prefixes
    else:
        prefixes = arguments.prefixes
    for prefix in prefixes:
        _show(prefix_lines(prefix))
    defects = [defect for prefix in prefixes for defect in verify(prefix)]
    for defect in defects:
        _complain(defect)
    return BAD_INPUT if defects else DONE


def _show(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _complain(line: str) -> None:
    print(line, file=sys.stderr)


def _refuse(line: str) -> None:
    _complain(f"kimi-pretrain: {line}")


def _prefix(text: str) -> Path:
    """A prefix, also where the name of one of its two files was given."""
    return Path(text.removesuffix(".bin").removesuffix(".idx")).expanduser()


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "kimi-pretrain data", description="Prepare and inspect tokens.", allow_abbrev=False
    )
    commands = parser.add_subparsers(required=True, metavar="prepare|verify|stats|index")
    _add_prepare(commands)
    check = commands.add_parser(
        "verify",
        help="check prepared files",
        description="Check hashes, layout, counts, token range and document ends. "
        "One line a defect; exit code 2 if there is any.",
    )
    check.add_argument("paths", nargs="+", type=_target, help="corpus directory, or prefix")
    check.set_defaults(run=_verify)
    stats = commands.add_parser("stats", help="show what a corpus holds")
    stats.add_argument("paths", nargs="+", type=_path, help="corpus directory, or one of several")
    stats.set_defaults(run=_stats)
    index = commands.add_parser(
        "index",
        help="show, merge and repair Megatron's files",
        description="Show and check <prefix>.bin/.idx, also those that Megatron wrote.",
    )
    index.add_argument("prefixes", nargs="+", type=_prefix, metavar="PREFIX")
    what = index.add_mutually_exclusive_group()
    what.add_argument("--merge", action="store_true", help="append the files, in order, into -o")
    what.add_argument("--rebuild", action="store_true", help="write a lost .idx from its .bin")
    index.add_argument(
        "-o", "--output", type=_prefix, metavar="PREFIX", help="where --merge writes"
    )
    index.add_argument("--eod", type=int, help="token id that ends documents, for --rebuild")
    index.add_argument(
        "--dtype", default="u2", choices=("u1", "u2", "i4", "i8"), help="tokens of --rebuild (u2)"
    )
    index.set_defaults(run=_index)
    return parser


def _add_prepare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    prepare_ = commands.add_parser(
        "prepare",
        help="turn text into tokens",
        description="Tokenise text into <output>/train/<domain>.bin/.idx and heldout/. "
        "Run it again after a kill and it goes on; run it with another --domain and the corpus "
        "has one more.",
        allow_abbrev=False,
    )
    add = prepare_.add_argument
    add(
        "inputs",
        nargs="*",
        type=_path,
        help="files and directories: .jsonl .parquet .txt, "
        "source trees; .gz and .zst of each but parquet",
    )
    add("-o", "--output", type=_path, required=True, help="corpus directory; for --recipe the root")
    add("--domain", default="text", help="name of the domain (text)")
    add("--recipe", metavar="NAME", help=f"no input but a built-in corpus: {', '.join(RECIPES)}")
    add(
        "--tokenizer",
        default="bpe",
        metavar="KIND[:PATH]",
        help="bytes, bpe (trained on the input unless PATH is given), tiktoken:PATH (bpe)",
    )
    add("--vocab-size", type=int, help=f"of a BPE trained here ({DEFAULT_VOCABULARY})")
    add("--format", choices=FORMATS, help="instead of what suffixes say")
    add("--text-field", default="text", help="field of JSON lines, column of parquet (text)")
    add("--heldout", type=float, default=0.01, help="share of the documents held out (0.01)")
    add(
        "--dedup",
        default="exact",
        choices=DEDUP,
        help="leave out repeated documents; whitespace: also those that differ in it only (exact)",
    )
    add(
        "--bad-input",
        default="refuse",
        choices=("refuse", "skip"),
        help="broken files and records: stop when all else is done, or count and go on (refuse)",
    )
    add("--source", help="where the text comes from, for the manifest (the names given)")
    add("--license", default="not stated", help="its licence, an SPDX expression")
    add("--workers", type=_positive, help="processes (all cores); the output does not depend on it")
    prepare_.set_defaults(run=_prepare)


def _target(text: str) -> Path:
    path = _path(text)
    return path if path.is_dir() else _prefix(text)


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("it must be at least 1")
    return number
