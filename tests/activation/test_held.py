"""What a backward that is no operation's needs: its tensors go where their tag's policy says."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from kimi_pretrain.activation.held import Held
from kimi_pretrain.activation.offload import Offloader, OffloadError
from kimi_pretrain.activation.saved import Activations, Saved
from kimi_pretrain.config.activation import policies
from kimi_pretrain.config.schema import ActivationConfig


@dataclass(frozen=True)
class Way:
    order: Tensor
    sizes: list[int]
    handle: Any


def test_every_tensor_leaves_and_comes_back_in_its_place() -> None:
    """Catches a tensor that stays, a field or one of a library's tuple, and one that comes back in
    the place of another."""
    offloader = Offloader(torch.device("cpu"), 2**14)
    how = Activations(policies(ActivationConfig("custom", {"route": "offload"})), offloader)
    saved = Saved(how)
    way = Way(
        torch.arange(5), [2, 3], (torch.ones(2, 2).bool(), (torch.arange(7).view(7, 1), None), 9)
    )
    storages = [
        StorageWeakRef(x.untyped_storage())  # type: ignore[no-untyped-call]
        for x in (way.order, way.handle[0], way.handle[1][0])
    ]
    held = Held(way, "route", saved)
    saved.close()
    del way
    assert saved.device_bytes() == {"route": 5 * 8 + 4 + 7 * 8}
    offloader.leave(saved.offloadable())
    offloader.settle(offloader.mark())
    assert all(storage.expired() for storage in storages)  # type: ignore[no-untyped-call]
    with pytest.raises(OffloadError, match="route is wanted while on the host"):
        held.load()
    offloader.fetch(saved.offloadable())
    back = held.load()
    assert torch.equal(back.order, torch.arange(5))
    assert back.sizes == [2, 3]
    mask, (column, nothing), number = back.handle
    assert torch.equal(mask, torch.ones(2, 2).bool())
    assert torch.equal(column, torch.arange(7).view(7, 1))
    assert (nothing, number) == (None, 9)
    del held
    assert saved.device_bytes() == {}
