"""Parameters and Newton-Schulz work of a stage by addition: layers of a kind are alike."""

from collections.abc import Iterable
from dataclasses import dataclass

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.optim.buckets import Spec
from kimi_pretrain.optim.ownership import newton_schulz_flops
from kimi_pretrain.plan.shapes import stage_specs

NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class Totals:
    """Of some parameters as one rank holds them."""

    experts: int = 0  # elements of routed experts
    dense: int = 0  # elements of the other matrices that Muon updates
    adamw: int = 0  # elements of all else
    newton_schulz: int = 0  # FLOPs a step on all of these

    @property
    def elements(self) -> int:
        return self.experts + self.dense + self.adamw

    def __add__(self, other: "Totals") -> "Totals":
        return Totals(
            self.experts + other.experts,
            self.dense + other.dense,
            self.adamw + other.adamw,
            self.newton_schulz + other.newton_schulz,
        )

    def times(self, count: int) -> "Totals":
        return Totals(
            count * self.experts,
            count * self.dense,
            count * self.adamw,
            count * self.newton_schulz,
        )

    @classmethod
    def of(cls, specs: Iterable[Spec]) -> "Totals":
        """The sum of ``specs``."""
        total = cls()
        for spec in specs:
            if not spec.muon:
                total += cls(adamw=spec.elements)
                continue
            rows, cols = spec.matrix
            work = spec.elements // (rows * cols) * newton_schulz_flops(rows, cols)
            work *= NEWTON_SCHULZ_STEPS
            if spec.expert:
                total += cls(experts=spec.elements, newton_schulz=work)
            else:
                total += cls(dense=spec.elements, newton_schulz=work)
        return total


class ModelTotals:
    """What every stage of a model holds, its experts divided by ``ep``."""

    def __init__(self, model: ModelConfig, ep: int) -> None:
        self.layers, self.dense_layers = model.num_hidden_layers, model.first_k_dense_replace
        first, last = (
            stage_specs(model, range(1), ep),
            stage_specs(model, range(self.layers - 1, self.layers), ep),
        )
        # The first layer is dense and the last is not, where the model has both kinds.
        self.dense = Totals.of(spec for spec in first if ".layers." in spec.name)
        self.moe = Totals.of(spec for spec in last if ".layers." in spec.name)
        self.embedding = Totals.of(s for s in first if "embed_tokens" in s.name)
        ends = ("model.norm.", "lm_head.")
        self.head = Totals.of(s for s in last if s.name.startswith(ends))

    def stage(self, layers: range) -> Totals:
        """Of consecutive layers, with the embedding if they are the first, the head if last."""
        dense = sum(layer < self.dense_layers for layer in layers)
        total = self.dense.times(dense) + self.moe.times(len(layers) - dense)
        if layers.start == 0:
            total += self.embedding
        return total + self.head if layers.stop == self.layers else total

    def rank(self, layers: Iterable[range]) -> Totals:
        """Of several stages."""
        total = Totals()
        for part in layers:
            total += self.stage(part)
        return total
