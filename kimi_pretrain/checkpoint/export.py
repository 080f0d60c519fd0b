"""From a checkpoint of any layout to Hugging Face's, file by file: no model in memory."""

from pathlib import Path

import torch
from torch import Tensor

from kimi_pretrain.checkpoint.hf_config import hf_config
from kimi_pretrain.checkpoint.part_files import PartFiles
from kimi_pretrain.checkpoint.shards import stream_weights, write_json
from kimi_pretrain.checkpoint.state import WEIGHTS, read_state
from kimi_pretrain.checkpoint.store import CheckpointError
from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.model.build import from_config


def export(
    checkpoint: Path,
    cfg: ModelConfig,
    directory: Path,
    dtype: torch.dtype | None = None,
    shard_bytes: int = 5_000_000_000,
) -> torch.dtype:
    """Write the weights of a checkpoint as ``to_hf`` writes those of the model it was saved from.

    Names and shapes are those of `cfg`'s model, which is made of shapes alone; all are held
    against the checkpoint before the first tensor is read. Memory holds one shard.

    Args:
        checkpoint: a verified checkpoint directory, written by any number of ranks.
        cfg: the model of its run.
        directory: created; what it held of an earlier export is replaced.
        dtype: of the weights, each the master rounded once; None is the run's compute dtype.
            The routers' selection biases stay fp32 (fp64 in an fp64 export).
        shard_bytes: a file grows to at most this size (or one tensor).

    Returns:
        The type of the weights.

    Raises:
        CheckpointError: the checkpoint's tensors are not those of the model.
    """
    dtype = dtype or _run_dtype(checkpoint)
    model = from_config(cfg, dtype=dtype, device="meta")
    targets = dict(model.hf_named_parameters()) | dict(model.hf_named_buffers())
    with PartFiles(checkpoint, WEIGHTS) as files:
        for name, target in targets.items():
            files.require(name, tuple(target.shape))
        for name in files:
            if name not in targets:
                raise CheckpointError(f"{checkpoint}: holds {name}, which {cfg.name} has not")

        def read(name: str) -> Tensor:
            target = targets[name]
            return files.read(name, tuple(target.shape)).to(target.dtype)

        directory.mkdir(parents=True, exist_ok=True)
        sizes = {name: target.nbytes for name, target in targets.items()}
        stream_weights(directory, sizes, read, shard_bytes)
    write_json(directory / "config.json", hf_config(cfg, str(dtype).removeprefix("torch.")))
    return dtype


def _run_dtype(checkpoint: Path) -> torch.dtype:
    """What the run computed in, as its checkpoint's state says ("torch.bfloat16")."""
    found = str(read_state(checkpoint).get("dtype"))
    dtypes = {str(dtype): dtype for dtype in (torch.bfloat16, torch.float32, torch.float64)}
    if found not in dtypes:
        raise CheckpointError(f"{checkpoint}: its state says dtype {found}")
    return dtypes[found]
