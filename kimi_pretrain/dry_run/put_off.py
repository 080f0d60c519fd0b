"""What weight gradients wait with: gradients of the outputs of products that were put off."""

from kimi_pretrain.dry_run.memory import LiveBytes
from kimi_pretrain.model.rank_model import RankModel
from kimi_pretrain.ops.main_grad import Deferral, Product

GRADIENTS = "gradients until W"  # their label among what is alive


class PutOff:
    """A deferral's place in a model's weights, which sees every product that is put off."""

    def __init__(self, deferral: Deferral, memory: LiveBytes) -> None:
        """``memory`` is told whose the gradients of ``deferral`` are."""
        self._deferral, self._memory = deferral, memory
        self.most = 0  # bytes that waited at once

    @property
    def into(self) -> "PutOff | None":
        """As the deferral's: None where products are not to wait."""
        return None if self._deferral.into is None else self

    def append(self, product: Product) -> None:
        """As to the deferral's list."""
        assert self._deferral.into is not None
        self._deferral.into.append(product)
        for gradient in product.gradients:
            self._memory.give(gradient, GRADIENTS)
        self.most = max(self.most, self._memory.of[GRADIENTS])


def watch_products(model: RankModel, deferral: Deferral, memory: LiveBytes) -> PutOff:
    """Let the weights of ``model`` put products off where ``memory`` learns of it."""
    put_off = PutOff(deferral, memory)
    for _, parameter in model.named_parameters():
        parameter.main_grad_deferral = put_off  # type: ignore[attr-defined]
    return put_off
