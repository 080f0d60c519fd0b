"""DualPipeV (DeepSeek, github.com/deepseek-ai/DualPipe): two stages a rank, there and back."""

from collections import Counter, deque

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.pipeline.actions import Action, Kind, Node, Overlap, Schedule
from kimi_pretrain.pipeline.errors import MicrobatchError
from kimi_pretrain.pipeline.shape import check_shape, v_placement


def dualpipe_v(pp: int, vpp: int, microbatches: int) -> Schedule:
    """DualPipeV, for comparison: rank r pairs its stage r with its stage 2 pp - 1 - r.

    The loss is on the first rank, next to the embedding. A rank keeps up to 2 pp + 1.

    Raises:
        ConfigError: ``vpp`` is not 2.
        MicrobatchError: fewer than ``2 pp`` microbatches.
    """
    check_shape(pp, vpp, microbatches)
    if vpp != 2:
        raise ConfigError("parallel.vpp", vpp, "dualpipe_v has two stages a rank", "parallel.vpp=2")
    if microbatches < 2 * pp:
        rule = "dualpipe_v fills its pipeline with twice as many microbatches as ranks"
        raise MicrobatchError(microbatches, rule, 2 * pp)
    ranks = tuple(tuple(_row(rank, pp, microbatches)) for rank in range(pp))
    bound = (2 * pp + 1,) * pp
    return Schedule("dualpipe_v", pp, 2, microbatches, ranks, v_placement(pp), bound)


class _Row:
    """A rank's row, written by half: 0 is the stage on the way there, 1 the one on the way back."""

    def __init__(self, rank: int, pp: int) -> None:
        self.nodes: list[Node] = []
        self._stages = (rank, 2 * pp - 1 - rank)
        self._next: Counter[tuple[str, int]] = Counter()  # microbatch of each half
        self._held: deque[Action] = deque()  # weight gradients whose turn has not come

    def _action(self, kind: Kind, half: int) -> Action:
        counter = ("forward" if kind is Kind.F else "backward", half)
        microbatch = self._next[counter]
        self._next[counter] += 1
        return Action(kind, self._stages[half], microbatch)

    def forward(self, half: int) -> None:
        self.nodes.append(self._action(Kind.F, half))

    def backward(self, half: int, *, hold_weights: bool = False) -> None:
        action = self._action(Kind.I if hold_weights else Kind.B, half)
        self.nodes.append(action)
        if hold_weights:
            self._held.append(Action(Kind.W, action.stage, action.microbatch))

    def weights(self) -> None:
        self.nodes.append(self._held.popleft())

    def pair(self, forward: int, backward: int) -> None:
        pair = Overlap(self._action(Kind.F, forward), self._action(Kind.B, backward))
        self.nodes.append(pair)


def _row(rank: int, pp: int, microbatches: int) -> list[Node]:
    after = pp - rank - 1  # ranks behind this one
    row = _Row(rank, pp)
    for _ in range(2 * after):
        row.forward(0)
    for _ in range(rank + 1):
        row.forward(0)
        row.forward(1)
    for _ in range(after):
        row.backward(1, hold_weights=True)
        row.weights()
        row.forward(1)
    for index in range(microbatches - 2 * pp + rank + 1):
        if index == 0 and after == 0:  # apart: the backward can start the earlier
            row.forward(0)
            row.backward(1)
        else:
            row.pair(0, 1)
        row.pair(1, 0)
    for _ in range(after):
        row.backward(1)
        row.pair(1, 0)
    for index in range(2 * (rank + 1)):  # from the middle on, weight gradients fill the bubble
        row.backward(1 - index % 2, hold_weights=index > rank)
    for _ in range(after):
        row.weights()
        row.backward(0, hold_weights=True)
    for _ in range(rank + 1):
        row.weights()
    return row.nodes
