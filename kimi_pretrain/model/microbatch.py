"""What all layers of one forward share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.ops.attention import several_documents
from kimi_pretrain.ops.precision import accumulate_dtype
from kimi_pretrain.ops.rope import rope_tables, softmax_scale


@dataclass(frozen=True)
class DeviceBatch:
    """Rows of a batch as tensors on the model's device; int64 tokens and labels."""

    tokens: Tensor  # [sequences, length]
    labels: Tensor  # [sequences, length], -100 where nothing is to be predicted
    document_ids: Tensor | None  # [sequences, length] int32


@dataclass(frozen=True)
class Microbatch:
    """Positions, documents and observer of one microbatch; built once, read by every layer."""

    cos: Tensor  # [length, rope / 2] fp32 (fp64 for fp64)
    sin: Tensor  # [length, rope / 2]
    softmax_scale: float
    document_ids: Tensor | None  # [batch, length]; None where each row is one document
    record: StepRecord | None

    @classmethod
    def build(
        cls,
        cfg: ModelConfig,
        length: int,
        dtype: torch.dtype,
        device: torch.device,
        document_ids: Tensor | None = None,
        record: StepRecord | None = None,
    ) -> "Microbatch":
        """Tables for positions 0 .. length - 1 and ``document_ids`` [batch, length]."""
        cos, sin = rope_tables(cfg, length, accumulate_dtype(dtype), device)
        return cls(cos, sin, softmax_scale(cfg), several_documents(document_ids), record)
