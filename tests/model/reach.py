"""Which tensors a tape keeps alive otherwise than by their tags.

Autograd's hooks see what operations save in autograd; an attribute of a ``ctx``, a closure that
backward will call or a field of the tape itself is seen by nobody else.
"""

from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from kimi_pretrain.activation.handles import Fp8Tile, Keep
from kimi_pretrain.activation.saved import Saved
from kimi_pretrain.model.tape import ChunkTape

# Handles, whose tensors have a tag, and what is alive without any tape.
_ENDS = (Keep, Fp8Tile, Saved, nn.Module, nn.Parameter, ModuleType, type, str, bytes, torch.Size)


def held_without_a_tag(tape: ChunkTape) -> dict[str, Tensor]:
    """Where they hang, and the tensors; of what all layers share too."""
    roots = [(f"a chain of {h.tag}", h) for h in tape.saved.handles()]
    found: dict[str, Tensor] = {}
    seen: dict[int, Any] = {}  # what was visited, kept so that no other gets its address
    waiting: list[tuple[str, Any]] = [("tape", tape), *roots]
    while waiting:
        path, thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, _ENDS):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, Tensor):
            found[path] = thing
        else:
            waiting += [(f"{path}{name}", inner) for name, inner in _held(thing)]
    return found


def _held(thing: Any) -> Iterator[tuple[str, Any]]:
    """What a thing keeps alive, by the name that it has there."""
    if isinstance(thing, dict):
        yield from ((f"[{key!r}]", value) for key, value in thing.items())
    elif isinstance(thing, tuple | list | set | frozenset):
        yield from ((f"[{index}]", inner) for index, inner in enumerate(thing))
    elif isinstance(thing, FunctionType):
        cells = zip(thing.__code__.co_freevars, thing.__closure__ or (), strict=True)
        yield from ((f".{thing.__name__}.{name}", cell.cell_contents) for name, cell in cells)
    elif isinstance(thing, MethodType):
        yield ".__self__", thing.__self__
    elif isinstance(thing, partial):
        yield from (("()", inner) for inner in (thing.func, thing.args, thing.keywords))
    else:
        if isinstance(thing, Node):
            yield from ((f" < {node.name()}", node) for node, _ in thing.next_functions if node)
        yield from ((f".{name}", value) for name, value in getattr(thing, "__dict__", {}).items())
