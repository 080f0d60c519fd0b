"""A configuration never names code to run.

Our own keys have no such place: names are looked up in registries. Hydra's part of a
composed configuration has some (launchers, sweepers and callbacks by ``_target_``, factories
in the logging settings), and a preset from somebody else can set them. What is not Hydra's
own, or an installed plugin of it, is refused before Hydra looks at it.
"""

from typing import Any

from kimi_pretrain.config.errors import ConfigError

# key -> prefixes of the dotted names it may hold
_ALLOWED: dict[str, tuple[str, ...]] = {
    "_target_": ("hydra._internal.core_plugins.", "hydra_plugins."),
    "class": ("logging.",),
    "()": (),
}


def refuse_code(node: Any, key: str = "hydra") -> None:
    """Check the plain container ``node`` of Hydra's own settings.

    Raises:
        ConfigError: a key that makes Hydra or logging import and call something foreign.
    """
    if isinstance(node, list):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return
    for name, value in node.items():
        place = f"{key}.{name}"
        if name in _ALLOWED and not str(value).startswith(_ALLOWED[name] or ("\0",)):
            rule = "a configuration names no code to run"
            raise ConfigError(place, value, rule, f"leaving {key} as it is")
        refuse_code(value, place)
