"""The dispatcher that a configuration asks for."""

from kimi_pretrain.config.schema import ParallelConfig
from kimi_pretrain.ops.kernels import REFERENCE, Kernels
from kimi_pretrain.parallel.collectives import Group
from kimi_pretrain.parallel.deepep import open_deepep
from kimi_pretrain.parallel.dispatch import AllToAllDispatcher, Dispatcher, LocalDispatcher


def open_dispatcher(
    parallel: ParallelConfig, group: Group, hidden_bytes: int, kernels: Kernels = REFERENCE
) -> Dispatcher:
    """The dispatcher of an expert-parallel group; within one rank nothing travels.

    Args:
        parallel: which one, and where router weights act.
        group: the ranks that share a layer's experts.
        hidden_bytes: of one row of hidden states.
        kernels: who permutes rows on this rank.

    Raises:
        ConfigError: it cannot run here.
    """
    at_experts = parallel.router_weights == "before_down"
    if group.size == 1:
        return LocalDispatcher(at_experts, kernels)
    if parallel.dispatcher == "deepep":
        return open_deepep(group, hidden_bytes)
    return AllToAllDispatcher(group, at_experts, kernels)
