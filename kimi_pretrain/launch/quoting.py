"""User values on their way into a script: quoted so that they arrive byte by byte, or refused.

Two readers, two rules. A shell takes anything within single quotes. Slurm reads ``#SBATCH``
lines by its own rules, with patterns after ``%`` and comments after ``#``: there, a value is
plain or it is refused.
"""

import re
import shlex
from collections.abc import Iterable

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.launcher import refuse_unprintable

_SPECIAL = re.compile(r"[\"'\\#%$`!*?;&|<>()\[\]{}~]")


def shell_word(what: str, text: str) -> str:
    """``text`` as one word of a POSIX shell's command line.

    Raises:
        ConfigError: it holds a control character, a line's end above all.
    """
    refuse_unprintable(what, text)
    return shlex.quote(text)


def shell_words(what: str, texts: Iterable[str]) -> list[str]:
    """``shell_word`` of each."""
    return [shell_word(what, text) for text in texts]


def refuse_path(what: str, path: str) -> str:
    """``path``, where it means itself in an ``#SBATCH`` line.

    Raises:
        ConfigError: a character to which Slurm, or a shell that is shown the path, would give
            a meaning.
    """
    refuse_unprintable(what, path)
    if _SPECIAL.search(path):
        rule = "Slurm gives some of its characters a meaning in a path"
        raise ConfigError(what, path, rule, _SPECIAL.sub("-", path))
    return path


def directive_value(text: str) -> str:
    """A checked path, or a pattern made of one, as Slurm reads one value of an option."""
    return f'"{text}"' if " " in text else text
