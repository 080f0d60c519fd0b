"""The intermediate representation of a pipeline schedule (design 4.2). Plain data, no torch.

A *stage* is a virtual stage: consecutive layers, numbered through the whole model from 0; a
rank holds ``vpp`` of them. A schedule lists what each rank does, in order. Its text is that
of torch.distributed.pipelining, whose names are kept:

=============  ==============  =============================================================
kind           text            meaning for stage s and microbatch m
=============  ==============  =============================================================
F              3F4             forward
I              3I4             backward, gradient of the stage's input only
W              3W4             backward, gradients of the stage's weights only
B              3B4             backward, I and W together
SEND_F         3SEND_F4        the output of s leaves for stage s + 1
RECV_F         3RECV_F4        the input of s arrives from stage s - 1
SEND_B         3SEND_B4        the gradient of s's input leaves for stage s - 1
RECV_B         3RECV_B4        the gradient of s's output arrives from stage s + 1
OFFLOAD        3OFFLOAD4       what s keeps of m for backward leaves the device
PREFETCH       3PREFETCH4      and comes back
RECOMPUTE      3RECOMPUTE4     what s does not keep of m is computed again, ahead of its backward
overlap        (3F4;7I3)OVERLAP_F_B   both, the all-to-all of one under the compute of the other
=============  ==============  =============================================================

A receive is posted where it stands and awaited by the compute action that needs it; a send is
started where it stands. So are the copies of OFFLOAD and PREFETCH; what comes back is awaited by
the first operation that needs it. Without a RECOMPUTE the backward computes again what it needs
when it comes to it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum


class Kind(StrEnum):
    """What an action does; the value is its text."""

    F = "F"
    I = "I"  # noqa: E741 - torch's name
    W = "W"
    B = "B"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"
    OFFLOAD = "OFFLOAD"
    PREFETCH = "PREFETCH"
    RECOMPUTE = "RECOMPUTE"


COMPUTE = frozenset({Kind.F, Kind.I, Kind.W, Kind.B})
BACKWARD = frozenset({Kind.I, Kind.B})  # what yields the gradient of a stage's input
SENDS = frozenset({Kind.SEND_F, Kind.SEND_B})
RECEIVES = frozenset({Kind.RECV_F, Kind.RECV_B})
COPIES = frozenset({Kind.OFFLOAD, Kind.PREFETCH})


@dataclass(frozen=True, slots=True)
class Action:
    """One thing one rank does for one stage and one microbatch."""

    kind: Kind
    stage: int
    microbatch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.microbatch}"


@dataclass(frozen=True, slots=True)
class Overlap:
    """A forward and a backward (I or B) of another microbatch, interleaved phase by phase."""

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"({self.forward};{self.backward})OVERLAP_F_B"


Node = Action | Overlap


def leaves(node: Node) -> tuple[Action, ...]:
    """The actions of a node: itself, or the two of a pair, the forward first."""
    return (node,) if isinstance(node, Action) else (node.forward, node.backward)


@dataclass(frozen=True)
class Schedule:
    """What every rank does, in order; immutable and the same on every rank.

    Two schedules are equal where their ranks do the same; the name and what was promised of
    memory are remarks, and the text form does not carry them.
    """

    name: str = field(compare=False)
    pp: int  # ranks
    vpp: int  # stages a rank
    microbatches: int
    ranks: tuple[tuple[Node, ...], ...]  # [pp] nodes of each rank
    placement: tuple[int, ...]  # [pp * vpp] the rank that holds each stage
    # [pp] the most (stage, microbatch) that a rank keeps for backward at once; None: not promised
    in_flight: tuple[int, ...] | None = field(default=None, compare=False)

    @property
    def stages(self) -> int:
        """Virtual stages of the model."""
        return self.pp * self.vpp

    def to_text(self) -> list[str]:
        """[pp] one row a rank, its nodes joined by commas, as torch.distributed.pipelining."""
        return [",".join(map(str, row)) for row in self.ranks]

    @classmethod
    def from_text(cls, rows: Sequence[str], name: str = "text") -> "Schedule":
        """The schedule that rows of text mean; shape and placement follow from what is there.

        Raises:
            ConfigError: a row that cannot be read, or that fits no pipeline; names the rank
                and the position.
        """
        from kimi_pretrain.pipeline.text import schedule_from_rows

        return schedule_from_rows(rows, name)

    def to_json(self) -> str:
        """All of it as one JSON object, the rows in the text format."""
        from kimi_pretrain.pipeline.text import schedule_to_json

        return schedule_to_json(self)

    @classmethod
    def from_json(cls, text: str) -> "Schedule":
        """What `to_json` wrote.

        Raises:
            ConfigError: it is not JSON, a field is missing or of another type, or the rows do
                not fit the fields.
        """
        from kimi_pretrain.pipeline.text import schedule_from_json

        return schedule_from_json(text)

    def digest(self) -> str:
        """SHA-256 of what the ranks do: equal on two ranks if they follow the same schedule."""
        return hashlib.sha256("\n".join(self.to_text()).encode()).hexdigest()
