"""The operations of a model for which there is more than one implementation, chosen once.

``REFERENCE`` is plain torch. ``ops.registry.kernels_for`` fills in what a run is to use; the model
calls the fields and does not know who is behind them. Each takes and gives what the function of
its name in ``ops`` does.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from kimi_pretrain.ops import attention as attend
from kimi_pretrain.ops import fp8_tiles, grouped, main_grad, norm, permute
from kimi_pretrain.ops import swiglu as gated

Op = Callable[..., Any]


@dataclass(frozen=True)
class Kernels:
    """One function an operation."""

    quantise_tiles: Op = fp8_tiles.quantise_tiles
    dequantise_tiles: Op = fp8_tiles.dequantise_tiles
    swiglu: Op = gated.swiglu
    swiglu_tiles: Op = gated.swiglu_tiles
    swiglu_tiles_backward: Op = gated.swiglu_tiles_backward
    rms_norm: Op = norm.rms_norm
    take_rows: Op = permute.take_rows
    summed_rows: Op = permute.summed_rows
    weighted_rows: Op = permute.weighted_rows
    attention: Op = attend.attention
    max_logits: Op = attend.max_logits
    grouped_linear: Op = grouped.grouped_linear
    add_product: Op = main_grad.add_product


REFERENCE = Kernels()
OPS = tuple(field.name for field in fields(Kernels))
