"""What a preflight has to say: findings, and the differences between hosts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

OK, NOTE, BAD = "ok", "note", "bad"
_SHOWN = 8  # hosts that a line names


@dataclass(frozen=True)
class Finding:
    """One line: ``bad`` would spoil a run, a ``note`` may, the rest is as it should be."""

    level: str
    what: str
    text: str
    fix: str = ""

    def line(self) -> str:
        """As a person reads it."""
        return f"{self.what}: {self.text}" + (f"; try {self.fix}" if self.fix else "")


def named(hosts: Sequence[str]) -> str:
    """``node-1``, ``node-1, node-2``, or the first few and how many there are."""
    shown = ", ".join(hosts[:_SHOWN])
    return shown + (f", ... ({len(hosts)} in all)" if len(hosts) > _SHOWN else "")


def differences(facts: Mapping[str, Mapping[str, str]]) -> list[Finding]:
    """Where hosts differ in what should be the same on all of them.

    Args:
        facts: host -> key -> value.

    Returns:
        One finding a key, which names the hosts that differ from most.
    """
    found = []
    for key in sorted({key for each in facts.values() for key in each}):
        hosts: dict[str, list[str]] = {}  # value -> the hosts that have it
        for host, each in facts.items():
            hosts.setdefault(each.get(key, "nothing"), []).append(host)
        usual, *odd = sorted(hosts, key=lambda value: -len(hosts[value]))
        for value in odd:
            text = f"{named(hosts[value])} has {value}, where {named(hosts[usual])} has {usual}"
            found.append(Finding(BAD, f"{key} differs", text, "one image and setting for all"))
    return found
