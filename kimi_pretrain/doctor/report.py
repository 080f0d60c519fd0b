"""A preflight as text, as JSON, and as one file to attach to a bug."""

import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from kimi_pretrain.config.secrets import masked
from kimi_pretrain.doctor.examine import Examination
from kimi_pretrain.doctor.findings import BAD, NOTE, OK

_MARKS = {OK: "  ok  ", NOTE: " note ", BAD: " BAD  "}


def text(found: Examination) -> str:
    """What a person reads, what is bad at the end, where the eye is."""
    return masked("\n".join(_lines(found)), os.environ)


def json_text(found: Examination) -> str:
    """Everything, for programs."""
    return masked(json.dumps(found.data(), indent=2), os.environ)


def bug_report(found: Examination, overrides: Sequence[str]) -> str:
    """The command, the text and everything behind it; no value of a secret variable."""
    command = masked(" ".join(["kimi-pretrain doctor", *overrides]), os.environ)
    return f"{command}\npython {sys.version}\n\n{text(found)}\n\n{json_text(found)}\n"


def _lines(found: Examination) -> Iterator[str]:
    ranks, hosts = len(found.hosts), len(found.looks)
    where = "this process" if ranks == 1 else f"{ranks} ranks on {hosts} host" + "s" * (hosts > 1)
    look = next(iter(found.looks.values()))
    yield f"kimi-pretrain doctor: {where}, {look['facts']['device']}, {look['facts']['dtype']}"
    yield from _versions(look["same"])
    yield from _kernels(look["same"])
    for level in (OK, NOTE, BAD):
        for finding in found.findings:
            if finding.level == level:
                yield f"{_MARKS[level]} {finding.line()}"
    bad = sum(finding.level == BAD for finding in found.findings)
    yield "fit for a run" if found.fit else f"not fit for a run: {bad} to mend"


def _versions(same: Mapping[str, Any]) -> Iterator[str]:
    found = {
        key.removeprefix("version of "): value
        for key, value in same.items()
        if key.startswith("version of ")
    }
    yield "versions: " + ", ".join(f"{name} {value}" for name, value in found.items())
    yield f"driver: {same['driver']}"


def _kernels(same: Mapping[str, Any]) -> Iterator[str]:
    """Ops by the implementation that serves them: few reasons hold for many ops."""
    ops: dict[str, list[str]] = {}
    for key, choice in same.items():
        if key.startswith("kernel of "):
            ops.setdefault(choice, []).append(key.removeprefix("kernel of "))
    for choice, names in ops.items():
        yield f"kernels, {choice}: {', '.join(names)}"
