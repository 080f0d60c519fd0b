"""How fast a run can be at most: from its costs, without a schedule or a simulation."""

from collections.abc import Sequence

from kimi_pretrain.config.schema import Config
from kimi_pretrain.parallel.topology import Topology
from kimi_pretrain.pipeline.actions import Kind
from kimi_pretrain.pipeline.costs import Costs
from kimi_pretrain.plan.costs import run_costs
from kimi_pretrain.plan.hardware import Hardware
from kimi_pretrain.plan.run_schedule import microbatches_of, rank_stages
from kimi_pretrain.plan.stages import split_layers
from kimi_pretrain.plan.totals import ModelTotals

# A W follows its I, and the last I of a rank is of its first stage.
_SOON = ("1f1b", "k2")


def most_tokens(config: Config, hardware: Hardware) -> float:
    """Tokens/s/GPU that a run cannot exceed.

    Raises:
        ConfigError: more stages than layers.
    """
    layers = split_layers(config.model, config.parallel)
    costs = run_costs(config, layers, hardware)
    seconds = least_seconds(config, costs) + least_update(config, layers, hardware)
    tokens = config.schedule.global_batch_size * config.data.sequence_length
    return tokens / seconds / Topology.of_config(config.parallel).world


def least_seconds(config: Config, costs: Costs) -> float:
    """Forwards and backwards of a step take at least this long, whatever waits for whom.

    A rank computes all its microbatches and does all its all-to-all, and only pairs do both at
    once. Before that its first microbatch comes through the stages before; and after its last
    input gradient that goes back through them, while the rank has at most one stage's W to do
    (ZB-H1 keeps more of them back).
    """
    name, count = config.parallel.schedule, microbatches_of(config)
    pairs = name in ("k2", "dualpipe_v")
    most = 0.0
    for stages in rank_stages(config):
        compute = exchange = 0.0
        for stage in stages:
            compute += costs.compute_seconds(Kind.F, stage) + costs.compute_seconds(Kind.B, stage)
            both = costs.forward.communication + costs.backward.communication
            exchange += costs.layers[stage] * both
        busy = count * (max(compute, exchange) if pairs else compute + exchange)
        before = range(stages[0])
        fill = sum(costs.alone_seconds(Kind.F, stage) + costs.p2p for stage in before)
        drain = sum(costs.alone_seconds(Kind.I, stage) + costs.p2p for stage in before)
        own = costs.compute_seconds(Kind.W, stages[0])
        most = max(most, busy + fill + max(0.0, drain - own) * (name in _SOON))
    return most


def least_update(config: Config, layers: Sequence[range], hardware: Hardware) -> float:
    """Newton-Schulz takes at least the mean of a rank's replicas."""
    topology = Topology.of_config(config.parallel)
    totals = ModelTotals(config.model, ep=1)  # of all replicas together
    most = 0.0
    for stages in rank_stages(config):
        total = totals.rank(layers[stage] for stage in stages)
        most = max(most, total.newton_schulz / topology.dp)
    return most / hardware.matmul
