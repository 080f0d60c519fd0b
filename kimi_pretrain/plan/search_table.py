"""What a search found as text of at most 100 columns, or as plain data for JSON."""

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from kimi_pretrain.plan.search import Candidate, Found, Ranked, Rejected

GB = 1e9
_NEAREST = 4  # rejected ones shown of each kind
_OVERRIDES = 3  # a line
_LONGEST = 94  # characters of a reason
_KINDS = {
    "GPU memory": "too large for a GPU",
    "host memory": "too large for the host",
    "shape": "impossible",
    "slower": "slower",
    "not tried": "not tried",
}
_HEAD = "  pp vpp  ep   dp  schedule         split    W held batch"


def search_lines(found: Found) -> Iterator[str]:
    """The ranking, and why the rest is not in it."""
    yield f"{found.model} on {found.gpus:,} x {found.cluster}: the fastest layouts that fit"
    yield f"{_HEAD}{'tokens/s/GPU':>13}{'MFU':>6}{'step s':>8}{'bubble':>7}{'GB':>6}"
    for one in found.ranked:
        plan = one.plan
        yield (
            f"{_shape(one.candidate)}{plan.tokens_per_gpu_second:>13,.0f}{plan.mfu:>6.3f}"
            f"{plan.step.seconds:>8.2f}{plan.step.timeline.bubble:>7.3f}"
            f"{plan.fullest.total / GB:>6.1f}"
        )
    if found.ranked:
        yield "the first as overrides:"
        overrides = found.ranked[0].candidate.overrides
        for start in range(0, len(overrides), _OVERRIDES):
            yield "  " + " ".join(overrides[start : start + _OVERRIDES])
    else:
        yield "  none"
    if found.proved and found.ranked:
        yield "no other layout can be faster: each either fails or has a bound below these"
    if not found.proved:
        yield "time ran out: a layout whose bound is higher may be faster; --seconds gives more"
    yield f"{len(found.rejected)} others (--json has the reason of each)"
    for kind, words in _KINDS.items():
        yield from _kind(words, [r for r in found.rejected if r.kind == kind])


def search_data(found: Found) -> dict[str, Any]:
    """All of it as what JSON can hold, every rejected layout with its reason."""
    return {
        "model": found.model,
        "cluster": found.cluster,
        "gpus": found.gpus,
        "proved": found.proved,
        "ranked": [_ranked(one) for one in found.ranked],
        "rejected": [
            asdict(r.candidate)
            | {"kind": r.kind, "reason": r.reason, "over": r.over, "bound": r.bound}
            for r in found.rejected
        ],
    }


def _ranked(one: Ranked) -> dict[str, Any]:
    plan = one.plan
    return asdict(one.candidate) | {
        "overrides": list(one.candidate.overrides),
        "memory": plan.fullest.total,
        "tokens_per_gpu_second": plan.tokens_per_gpu_second,
        "mfu": plan.mfu,
        "step_seconds": plan.step.seconds,
        "bubble": plan.step.timeline.bubble,
    }


def _kind(words: str, rejected: list[Rejected]) -> Iterator[str]:
    if not rejected:
        return
    yield f"{words}: {len(rejected)}, the nearest"
    for one in sorted(rejected, key=lambda r: (r.over, -r.bound))[:_NEAREST]:
        yield _shape(one.candidate)
        reason = one.reason
        yield f"      {reason if len(reason) <= _LONGEST else reason[: _LONGEST - 3] + '...'}"


def _shape(c: Candidate) -> str:
    held = "" if c.weight_grads_held is None else c.weight_grads_held
    return (
        f"{c.pp:4}{c.vpp:4}{c.ep:4}{c.dp:5}  {c.schedule:17}{c.layer_split:9}{held:>6}"
        f"{c.micro_batch_size:>6}"
    )
