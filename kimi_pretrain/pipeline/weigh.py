"""What lies on a device for backwards, by tag: each storage once."""

from collections import Counter
from collections.abc import Iterable

from torch import Tensor

from kimi_pretrain.activation.saved import Activations
from kimi_pretrain.config.activation import GRADIENTS, WAITING
from kimi_pretrain.ops.main_grad import Product


def weighed(activations: Activations, products: Iterable[Product]) -> Counter[str]:
    """Bytes by tag, and of weight gradients' products that were put off."""
    sizes: Counter[str] = Counter()
    seen: set[int] = set()

    def count(tag: str, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            sizes[tag] += storage.nbytes()

    for saved in activations.live:
        for handle in saved.handles():
            for part in handle.parts:
                count(handle.tag, part)
            if handle.loaded is not None:
                count(handle.tag, handle.loaded)
    put_off = list(products)
    for product in put_off:
        count(WAITING, product.x)
    for product in put_off:
        for gradient in product.gradients:
            count(GRADIENTS, gradient)
    return sizes
