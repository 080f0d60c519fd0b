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


def hf_tensors(
    name: str, shape: tuple[int, ...], first_expert: int = 0
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(Hugging Face name, shape) of what one tensor stacks, in the order of its memory.

    What ``hf_views`` gives names to, from the shape alone: consecutive runs of the flattened
    tensor.
    """
    if _EXPERTS in name:
        layer, _, projection = name.partition(_EXPERTS)
        for expert in range(first_expert, first_expert + shape[0]):
            inner = f"{layer}{_EXPERTS}{expert}.{projection}"
            yield from ((hf_name, shape[-2:]) for hf_name in _gate_up_names(inner))
        return
    stacked = name.endswith(_GATE_UP)
    yield from ((hf_name, shape[1:] if stacked else shape) for hf_name in _gate_up_names(name))


def _gate_up_names(name: str) -> list[str]:
    if name.endswith(_GATE_UP):
        prefix = name.removesuffix(_GATE_UP)
        return [f"{prefix}.gate_proj.weight", f"{prefix}.up_proj.weight"]
    return [f"{name}.weight" if _EXPERTS in name else name]


def _gate_up_views(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    names = _gate_up_names(name)
    yield from zip(names, tensor if len(names) == 2 else [tensor], strict=True)
