"""Which layers a pipeline stage holds."""

from collections.abc import Callable, Sequence
from functools import cache
from math import inf

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import ModelConfig, ParallelConfig
from kimi_pretrain.plan.parameters import attention_parameters


def split_layers(model: ModelConfig, parallel: ParallelConfig) -> list[range]:
    """The layers of every stage, as ``parallel.layer_split`` says.

    ``balanced`` weighs a layer by the larger of its shares of the model's time (parameters
    that a token passes) and of a rank's memory (parameters that a rank holds), the embedding
    and the head included.

    Raises:
        ConfigError: more stages than layers.
    """
    stages = parallel.pp * parallel.vpp
    if parallel.vpp > 1 and stages > model.num_hidden_layers:
        most = model.num_hidden_layers // parallel.pp
        raise ConfigError(
            "parallel.pp x parallel.vpp",
            stages,
            f"a stage holds at least one of the model's {model.num_hidden_layers} layers",
            f"parallel.vpp={most}" if most else f"parallel.pp={model.num_hidden_layers}",
        )
    if parallel.layer_split == "even":
        return stage_layers(model.num_hidden_layers, stages)
    attention = attention_parameters(model)
    expert = 3 * model.hidden_size * model.moe_intermediate_size
    dense = 3 * model.hidden_size * model.intermediate_size
    always = attention + model.n_shared_experts * expert
    held = model.n_routed_experts // parallel.ep
    vocabulary = model.vocab_size * model.hidden_size
    layers = [
        (attention + dense, attention + dense)
        if layer < model.first_k_dense_replace
        else (always + model.num_experts_per_tok * expert, always + held * expert)
        for layer in range(model.num_hidden_layers)
    ]
    time = sum(layer[0] for layer in layers) + vocabulary
    memory = sum(layer[1] for layer in layers) + 2 * vocabulary
    costs = tuple(max(layer[0] / time, layer[1] / memory) for layer in layers)
    last = max(vocabulary / time, vocabulary / memory)
    return list(_balanced(costs, stages, vocabulary / memory, last))


@cache
def _balanced(
    costs: tuple[float, ...], stages: int, first: float, last: float
) -> tuple[range, ...]:
    """``balanced_layers``, once for all the layouts that a search tries."""
    return tuple(balanced_layers(costs, stages, first, last))


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
