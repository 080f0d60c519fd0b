"""Which layers a pipeline stage holds."""

from collections.abc import Callable, Sequence
from math import inf

from kimi_pretrain.config.errors import ConfigError


def stage_layers(layers: int, stages: int) -> list[range]:
    """Consecutive layers of each stage, as even as whole layers allow, the larger ones first.

    Every stage but the last ones holds ``ceil(layers / stages)``, and what is missing to that
    is missing at the end, where the head is: K2's 61 on 16 stages are 15 x 4 and 1. Where
    that would leave a stage empty, the last ones hold one layer each.

    Args:
        layers: of the model.
        stages: of the pipeline.

    Returns:
        [stages] ranges that follow each other from 0 to ``layers``.

    Raises:
        ConfigError: more stages than layers.
    """
    if stages > layers:
        raise ConfigError(
            "parallel.pp",
            stages,
            f"a stage holds at least one of the model's {layers} layers",
            f"parallel.pp={layers}",
        )
    ranges, start, size = [], 0, -(-layers // stages)
    for stage in range(stages):
        later = stages - stage - 1  # each needs a layer
        stop = min(start + size, layers - later)
        ranges.append(range(start, stop))
        start = stop
    return ranges


def balanced_layers(
    costs: Sequence[float], stages: int, first_extra: float = 0.0, last_extra: float = 0.0
) -> list[range]:
    """Consecutive layers of each stage so that the costliest stage costs least.

    A pipeline is as slow as its slowest stage, and a run needs the memory of its fullest. Any
    measure does: seconds, bytes, or of each layer the larger of its shares of both. Of the
    splits with that least maximum it is the most even one (least sum of squares).

    Args:
        costs: [layers] of each layer, at least 0.
        stages: of the pipeline, pp x vpp.
        first_extra: cost of what the first stage does besides its layers: the embedding.
        last_extra: cost of what the last stage does besides: the norm, the head and the loss.

    Returns:
        [stages] ranges that follow each other from 0 to ``layers``; none is empty.

    Raises:
        ConfigError: more stages than layers.
    """
    layers = len(costs)
    if not 1 <= stages <= layers:
        rule = f"every stage (parallel.pp x parallel.vpp) holds one of the model's {layers} layers"
        raise ConfigError("pipeline stages", stages, rule, f"{min(max(stages, 1), layers)} stages")
    before = [0.0]  # [layers + 1] cost of the layers before
    for cost in costs:
        before.append(before[-1] + cost)

    def size(stage: int, start: int, stop: int) -> float:
        extra = (stage == 0) * first_extra + (stage == stages - 1) * last_extra
        return before[stop] - before[start] + extra

    least, _ = _partition(layers, stages, lambda total, *stage: max(total, size(*stage)))
    limit = least * (1 + 1e-9)  # sums in another order may differ in their last digits

    def squares(total: float, *stage: int) -> float:
        cost = size(*stage)
        return total + cost * cost if cost <= limit else inf

    _, ranges = _partition(layers, stages, squares)
    return ranges


def _partition(
    layers: int, stages: int, score: Callable[[float, int, int, int], float]
) -> tuple[float, list[range]]:
    """The split of least score, by dynamic programming over (stage, where it ends).

    ``score(score of the stages before, stage, start, stop)``, monotone in its first argument.
    """
    # where the stages so far end -> their score and ranges
    best: dict[int, tuple[float, list[range]]] = {0: (0.0, [])}
    for stage in range(stages):
        later = stages - stage - 1  # each needs a layer
        best = {
            stop: min(
                (
                    (score(total, stage, start, stop), [*ranges, range(start, stop)])
                    for start, (total, ranges) in best.items()
                    if start < stop
                ),
                key=lambda choice: choice[0],
            )
            for stop in range(stage + 1, layers - later + 1)
        }
    return best[layers]
