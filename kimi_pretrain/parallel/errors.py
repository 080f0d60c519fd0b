"""What a rank says when another one does not answer."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from kimi_pretrain.config.errors import ConfigError


class PeerError(RuntimeError):
    """A peer failed or did not answer in time; the run cannot go on (exit code 4).

    ``shared``: every rank raises the same, so rank 0 speaks for all.
    """

    def __init__(self, message: str, shared: bool = False) -> None:
        super().__init__(message)
        self.shared = shared


class SharedConfigError(ConfigError):
    """A refusal that every rank raises, so rank 0 speaks for all."""


def parts(error: ConfigError) -> tuple[str, object, str, str]:
    """What a ConfigError is made of, as it can travel in JSON."""
    plain = isinstance(error.value, str | int | float | bool | None)
    return error.what, error.value if plain else repr(error.value), error.rule, error.fix


@contextmanager
def during(doing: str) -> Iterator[None]:
    """A PeerError from within says what this rank was ``doing``."""
    try:
        yield
    except PeerError as error:
        raise PeerError(f"{error} (while {doing})", error.shared) from error


def named(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 1, 2, 5``, or the first few and how many there are."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:8]))
    return f"ranks {shown}" + (f", ... ({len(ranks)} in all)" if len(ranks) > 8 else "")


def first_line(error: BaseException) -> str:
    """What an error of torch.distributed says, without where in C++ and what to do in general."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    said, _, _ = line.partition(". This is typically caused by")
    return re.sub(r"^\[[^\]]*:\d+\] ", "", said)[:300]
