"""How a rank keeps its activations: the configuration's policies, and room on the host."""

from collections.abc import Sequence
from functools import partial
from math import ceil

import torch

from kimi_pretrain.activation.offload import Offloader
from kimi_pretrain.activation.saved import Activations
from kimi_pretrain.activation.timed import TimedStream
from kimi_pretrain.config.activation import offloads, policies
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config
from kimi_pretrain.config.settled import micro_batch_size
from kimi_pretrain.ops.kernels import Op
from kimi_pretrain.ops.registry import select
from kimi_pretrain.ops.streams import open_stream
from kimi_pretrain.parallel.stopwatch import Stopwatch
from kimi_pretrain.pipeline.actions import Schedule
from kimi_pretrain.plan.activations import Setting, stage_kept
from kimi_pretrain.plan.in_flight import most_held
from kimi_pretrain.plan.memory import HOST_MARGIN, host_slab

_PLANNED_BYTES = 2  # of an element: plans are in bf16


def open_activations(
    config: Config,
    schedule: Schedule,
    layers: Sequence[range],
    rank: int,
    dtype: torch.dtype,
    device: torch.device,
    stopwatch: Stopwatch,
) -> Activations:
    """The activations of one rank of a pipeline.

    Args:
        config: settled.
        schedule: that it follows.
        layers: of every stage.
        rank: of the pipeline.
        dtype: of the model.
        device: of the model.
        stopwatch: told of waits for what was offloaded.

    Raises:
        ConfigError: no such policy, or FP8 of a dtype that has no tiles.
    """
    chosen = policies(config.activation)
    fp8 = [tag for tag, policy in chosen.items() if policy.fp8]
    if fp8 and dtype not in (torch.bfloat16, torch.float32):
        rule = f"{fp8[0]} is FP8, and its tiles are cut from bf16 or fp32"
        raise ConfigError("precision", dtype, rule, "precision=bf16")
    offloader = None
    if offloads(config.activation):
        size = config.activation.host_bytes
        if size is None:
            size = ceil(host_slab(config, _most_on_host(config, schedule, layers, rank, dtype)))
        waiting = partial(stopwatch.waiting, "offload")
        offloader = Offloader(device, size, TimedStream(open_stream(device, "copy"), waiting))
    return Activations(
        chosen,
        offloader,
        *(_tiles(config.kernels, device, dtype) if fp8 else ()),
    )


def needless(config: Config, dtype: torch.dtype) -> str | None:
    """A line about what a policy keeps, on the host where it can, and need not keep; or None."""
    model, parallel = config.model, config.parallel
    moe = model.num_hidden_layers > model.first_k_dense_replace
    leaves = policies(config.activation)["expert_out"].offload
    if not moe or not leaves or parallel.router_weights != "after_combine":
        return None
    size = dtype.itemsize * model.num_experts_per_tok * model.hidden_size
    return (
        f"activation={config.activation.policy} keeps experts' outputs for backward, {size:,} "
        "bytes a token and MoE layer, because router weights multiply them; with "
        "parallel.router_weights=before_down it keeps none"
    )


def cramped(
    config: Config, schedule: Schedule, layers: Sequence[range], dtype: torch.dtype
) -> str | None:
    """A line about a slab that is smaller than what some rank offloads by the plan; or None.

    Args:
        config: settled.
        schedule: that the run follows.
        layers: of every stage.
        dtype: of the model.
    """
    size = config.activation.host_bytes
    if size is None or not offloads(config.activation):
        return None
    needed = [_most_on_host(config, schedule, layers, rank, dtype) for rank in range(schedule.pp)]
    most = max(needed)
    if size >= most:
        return None
    return (
        f"activation.host_bytes={size} is less than the {ceil(most)} that pipeline rank "
        f"{needed.index(most)} has on the host at most by the plan: the rest waits on the device; "
        f"activation.host_bytes={ceil(HOST_MARGIN * most)} has room for uneven routing too"
    )


def _most_on_host(
    config: Config, schedule: Schedule, layers: Sequence[range], rank: int, dtype: torch.dtype
) -> float:
    """Bytes that a pipeline rank has on the host at most, with balanced routing."""
    setting = Setting.of(config, micro_batch_size(config))
    held = most_held(schedule, rank, [stage_kept(setting, part) for part in layers])
    return held.host * dtype.itemsize / _PLANNED_BYTES


def _tiles(kernels: str, device: torch.device, dtype: torch.dtype) -> tuple[Op, Op]:
    """Quantise and dequantise."""
    return (
        select("quantise_tiles", kernels, device.type, dtype),
        select("dequantise_tiles", kernels, device.type, dtype),
    )
