"""What must be the same on every rank of a run, and what rank 0 decides for all."""

import numpy as np
import safetensors
import torch

from kimi_pretrain.config.saved import flat
from kimi_pretrain.config.schema import Config
from kimi_pretrain.ops.precision import resolve
from kimi_pretrain.ops.registry import summary
from kimi_pretrain.parallel.world import World
from kimi_pretrain.train.schedule import training_schedule


def facts_of_run(config: Config) -> dict[str, str]:
    """What ranks compare when they meet, before any process group exists, causes first.

    The libraries that read and write for a run, every value of its configuration by its key,
    the kernels that it found, and the digest of its schedule, which a file may hold. ``run_dir``
    is left out: its default contains the time.
    """
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = "cpu" if accelerator is None else accelerator.type
    values = {key: str(value) for key, value in flat(config).items() if key != "run_dir"}
    return {
        "version of numpy": np.__version__,
        "version of safetensors": safetensors.__version__,
        **values,
        "kernels in use": summary(config.kernels, device, resolve(config.precision)),
        "digest of the schedule": training_schedule(config).digest(),
    }


def agreed_run_dir(world: World, config: Config) -> str:
    """Rank 0's ``run_dir``, on every rank."""
    return world.everyone.gather_texts(config.run_dir if world.is_first else "")[0]
