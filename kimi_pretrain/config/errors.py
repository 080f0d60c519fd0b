"""The one error a user can cause by a value: one line, four parts."""


class ConfigError(ValueError):
    """A configuration or an input cannot be used.

    The message is one line that says what failed, the value, the rule it breaks and
    the nearest fix. The command line prints it and exits with code 2, before any
    process group exists.
    """

    def __init__(self, what: str, value: object, rule: str, fix: str) -> None:
        self.what = what
        self.value = value
        self.rule = rule
        self.fix = fix
        line = f"{what}: got {value!r}; {rule}; try {fix}"
        super().__init__(" ".join(line.split()))
