"""Which layers a pipeline stage holds."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from math import inf

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import ModelConfig, ParallelConfig
from kimi_pretrain.plan.flops import HEAD_MIN_TOKENS, head_products
from kimi_pretrain.plan.parameters import attention_parameters


def split_layers(model: ModelConfig, parallel: ParallelConfig) -> list[range]:
    """The layers of every stage, as ``parallel.layer_split`` says.

    ``balanced`` takes of all splits those whose slowest stage is fastest (time: parameters that
    a token is multiplied by, and how often), of these those whose fullest stage holds least
    (memory: parameters that a rank holds), and of these the most even. Embedding and head count.

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
    first = min(model.first_k_dense_replace, model.num_hidden_layers)
    moe = model.num_hidden_layers - first
    time = always + model.num_experts_per_tok * expert
    # Layers are multiplied three times in all, the head four where backward needs logits again.
    head = vocabulary * sum(head_products(model, HEAD_MIN_TOKENS)) / 3
    return list(
        _balanced(
            Loads((attention + dense,) * first + (time,) * moe, 0.0, head),
            Loads(
                (attention + dense,) * first + (always + held * expert,) * moe,
                vocabulary,
                vocabulary,
            ),
            stages,
        )
    )


@cache
def _balanced(time: "Loads", memory: "Loads", stages: int) -> tuple[range, ...]:
    """``balanced_layers``, once for all the layouts that a search tries."""
    return tuple(balanced_layers(time, stages, memory))


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


@dataclass(frozen=True)
class Loads:
    """What layers cost, and the ends of the pipeline besides: seconds, bytes, any measure."""

    layers: tuple[float, ...]  # [layers], at least 0
    first: float = 0.0  # the embedding
    last: float = 0.0  # the norm, the head and the loss

    def of(self, stages: int) -> Callable[[int, int, int], float]:
        """(stage, start, stop) -> what layers start .. stop - 1 cost as that one of ``stages``."""
        before = [0.0, *accumulate(self.layers)]

        def load(stage: int, start: int, stop: int) -> float:
            extra = (stage == 0) * self.first + (stage == stages - 1) * self.last
            return before[stop] - before[start] + extra

        return load


def balanced_layers(time: Loads, stages: int, memory: Loads | None = None) -> list[range]:
    """Consecutive layers of each stage so that the slowest stage is fastest.

    A pipeline is as slow as its slowest stage, and a run needs the memory of its fullest: of the
    splits with the least maximum of time, those with the least maximum of memory, and of these
    the most even one in time (least sum of squares).

    Args:
        time: of the layers.
        stages: of the pipeline, pp x vpp.
        memory: of the layers; None: it does not matter.

    Returns:
        [stages] ranges that follow each other from 0 to ``layers``; none is empty.

    Raises:
        ConfigError: more stages than layers.
    """
    layers = len(time.layers)
    if not 1 <= stages <= layers:
        rule = f"every stage (parallel.pp x parallel.vpp) holds one of the model's {layers} layers"
        raise ConfigError("pipeline stages", stages, rule, f"{min(max(stages, 1), layers)} stages")
    slow, full = time.of(stages), (memory or Loads((0.0,) * layers)).of(stages)
    rounding = 1 + 1e-9  # sums in another order may differ in their last digits
    slowest, _ = _partition(layers, stages, lambda most, *stage: max(most, slow(*stage)))
    in_time = slowest * rounding

    def fullest_in_time(most: float, *stage: int) -> float:
        return max(most, full(*stage)) if slow(*stage) <= in_time else inf

    fullest, _ = _partition(layers, stages, fullest_in_time)
    in_memory = fullest * rounding

    def squares(total: float, *stage: int) -> float:
        fits = slow(*stage) <= in_time and full(*stage) <= in_memory
        return total + slow(*stage) ** 2 if fits else inf

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
