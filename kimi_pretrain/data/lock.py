"""One process at a time: an advisory lock that dies with its holder, kill -9 included."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kimi_pretrain.config.errors import ConfigError


@contextmanager
def exclusive(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path` for a while; gives False if it is held and `wait` is off.

    Raises ConfigError if the file cannot be written. It stays when all is done: removing it
    would let a third process lock a new one beside the old.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    except OSError as error:
        raise ConfigError(
            "directory for prepared data",
            str(path.parent),
            f"it must be writable ({error.strerror})",
            "another directory: data.root=DIR, KIMI_DATA=DIR or --output DIR",
        ) from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True
