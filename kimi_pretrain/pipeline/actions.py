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
overlap        (3F4;7I3)OVERLAP_F_B   both, the all-to-all of one under the compute of the other
=============  ==============  =============================================================

A receive is posted where it stands and awaited by the compute action that needs it; a send is
started where it stands.
"""

from dataclasses import dataclass
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


COMPUTE = frozenset({Kind.F, Kind.I, Kind.W, Kind.B})


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


@dataclass(frozen=True)
class Schedule:
    """What every rank does, in order; immutable and the same on every rank."""

    name: str
    pp: int  # ranks
    vpp: int  # stages a rank
    microbatches: int
    ranks: tuple[tuple[Node, ...], ...]  # [pp] nodes of each rank
    placement: tuple[int, ...]  # [pp * vpp] the rank that holds each stage

    @property
    def stages(self) -> int:
        """Virtual stages of the model."""
        return self.pp * self.vpp
