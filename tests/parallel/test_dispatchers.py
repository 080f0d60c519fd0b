"""Which dispatcher a configuration gets."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import ParallelConfig
from kimi_pretrain.parallel.collectives import Group
from kimi_pretrain.parallel.dispatch import AllToAllDispatcher, LocalDispatcher
from kimi_pretrain.parallel.dispatchers import open_dispatcher


def test_each_name_gets_its_dispatcher() -> None:
    """Catches a configuration that is read by nobody."""
    process_group: Any = object()
    four = Group("ep", range(4), 1, process_group)
    plain, early = ParallelConfig(), ParallelConfig(router_weights="before_down")
    assert type(open_dispatcher(plain, Group("ep"), 64)) is LocalDispatcher
    assert open_dispatcher(early, Group("ep"), 64).weights_at_experts
    spread = open_dispatcher(plain, four, 64)
    assert type(spread) is AllToAllDispatcher
    assert not spread.weights_at_experts
    assert spread.experts(8) == range(2, 4)
    assert open_dispatcher(early, four, 64).weights_at_experts
    with pytest.raises(ConfigError, match="DeepEP"):
        open_dispatcher(replace(early, dispatcher="deepep"), _on_cpu(), 64)


def _on_cpu() -> Group:
    class OnCpu(Group):
        device = torch.device("cpu")  # type: ignore[assignment]

        @property
        def size(self) -> int:
            return 2

    return OnCpu("ep")
