"""Between stacked parameters and Hugging Face's names, one matrix each (design 4.7).

The model stacks what is multiplied together: gate with up, and the experts of a layer.
Checkpoints, metrics and peers speak of single matrices under DeepSeek-V3's names.
"""

from collections.abc import Iterator

from torch import Tensor

_GATE_UP = ".gate_up_proj"
_EXPERTS = ".experts."


def hf_views(name: str, tensor: Tensor, first_expert: int = 0) -> Iterator[tuple[str, Tensor]]:
    """Unstack one tensor into (Hugging Face name, view) pairs; views share its memory.

    Works on parameters, gradients, momenta and masters alike. What is not stacked yields
    itself.

    Args:
        name: of the parameter in the model.
        tensor: of the parameter's shape; the last two dimensions are a matrix.
        first_expert: index of the stack's first expert, where a rank holds a part of them.
    """
    if _EXPERTS not in name:
        yield from _gate_up_views(name, tensor)
        return
    layer, _, projection = name.partition(_EXPERTS)
    for expert, stack in enumerate(tensor.unbind(0), start=first_expert):
        yield from _gate_up_views(f"{layer}{_EXPERTS}{expert}.{projection}", stack)


def _gate_up_views(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if name.endswith(_GATE_UP):
        prefix = name.removesuffix(_GATE_UP)
        yield f"{prefix}.gate_proj.weight", tensor[0]
        yield f"{prefix}.up_proj.weight", tensor[1]
    elif _EXPERTS in name:
        yield f"{name}.weight", tensor
    else:
        yield name, tensor
