"""One start at a time in a run directory: two would mix their rows and checkpoints."""

from contextlib import ExitStack
from pathlib import Path

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.data.lock import exclusive

LOCK = ".lock"


def make_run_dir(directory: Path) -> None:
    """Make the run directory, or raise ConfigError where it cannot be written."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        (directory / LOCK).touch()
    except OSError as error:
        rule = f"it must be writable ({error.strerror})"
        raise ConfigError("run_dir", str(directory), rule, "run_dir=DIR") from error


def hold_run_dir(directory: Path) -> ExitStack:
    """Make the run directory and keep every other start out of it until the result is closed.

    The lock ends with its process, however that ends.

    Raises:
        ConfigError: it cannot be written, or another process holds it.
    """
    make_run_dir(directory)
    lock = ExitStack()
    if not lock.enter_context(exclusive(directory / LOCK, wait=False)):
        raise ConfigError(
            "run_dir",
            str(directory),
            "another process is training in it, and two would mix their rows and checkpoints",
            "another run_dir, or wait until it ends",
        )
    return lock
