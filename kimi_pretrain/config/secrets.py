"""Secrets stay in the environment: a configuration is saved, printed and uploaded.

Three ways in are closed, each before anything is written: a key that looks like a secret, an
interpolation of an environment variable that looks like one, and the very value of such a
variable (a shell expands ``$WANDB_API_KEY`` before anybody sees it). W&B and the like read
their keys from the environment themselves.
"""

import re
from collections.abc import Iterable, Mapping

from kimi_pretrain.config.errors import ConfigError

# The last word decides: HF_TOKEN and api_key are secrets, sample_tokens and TOKENIZERS_PATH not.
_SECRET_NAME = re.compile(r"(^|[_.\W]|api)(key|token|secret|password|passwd|credentials?)$", re.I)
_ENVIRONMENT = re.compile(r"oc\.env:\s*['\"]?([A-Za-z_]\w*)")
_SHORTEST_SECRET = 8  # characters; shorter values ("true", "1") occur everywhere
_MASK = "***"


def refuse_secrets(settings: Iterable[tuple[str, str]], environ: Mapping[str, str]) -> None:
    """Check (key, text) pairs against the environment ``environ``.

    Raises:
        ConfigError: a key, a referenced variable or a value is a secret; the line names the
            key and masks the value.
    """
    secrets = _secrets(environ)
    for key, text in settings:
        if _SECRET_NAME.search(key):
            rule = "a configuration is saved with the run and must hold no secret"
            raise ConfigError(key, _MASK, rule, "an environment variable, as in WANDB_API_KEY")
        for variable in _ENVIRONMENT.findall(text):
            if _SECRET_NAME.search(variable):
                rule = f"{variable} looks like a secret and a configuration is saved with the run"
                raise ConfigError(key, _MASK, rule, "leaving it to the library that reads it")
        for variable, value in secrets.items():
            if value in text:
                rule = f"it holds the value of {variable} and a configuration is saved with the run"
                raise ConfigError(key, _MASK, rule, "leaving it to the library that reads it")


def masked(text: str, environ: Mapping[str, str]) -> str:
    """``text`` without the values of those variables of ``environ`` that look like secrets."""
    for value in sorted(_secrets(environ).values(), key=len, reverse=True):
        text = text.replace(value, _MASK)
    return text


def is_secret(name: str) -> bool:
    """Whether a key or a variable of that name holds a secret."""
    return _SECRET_NAME.search(name) is not None


def _secrets(environ: Mapping[str, str]) -> dict[str, str]:
    return {
        name: value
        for name, value in environ.items()
        if is_secret(name) and len(value) >= _SHORTEST_SECRET
    }
