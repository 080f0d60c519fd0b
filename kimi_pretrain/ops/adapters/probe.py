"""Whether an optional library is there, told from one that is there and broken."""

import importlib
from collections.abc import Sequence


def obstacle(modules: Sequence[str], absent: str) -> str | None:
    """Import ``modules``; None, or why they cannot be used.

    Args:
        modules: names, the outermost package first.
        absent: what to say where the first is not installed.
    """
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and modules[0].startswith(error.name):
                return absent
            return f"it does not load: {error}"
        except (ImportError, OSError, RuntimeError) as error:  # built for another torch or CUDA
            return f"it does not load: {str(error).splitlines()[0]}"
    return None
