"""What must be the same on every rank, compared once before a run is assembled."""

import json

import numpy as np
import safetensors

from kimi_pretrain.config.saved import flat
from kimi_pretrain.config.schema import Config
from kimi_pretrain.parallel.rendezvous import disagreement
from kimi_pretrain.parallel.world import World
from kimi_pretrain.train.schedule import training_schedule


def require_agreement(world: World, config: Config) -> None:
    """Compare every rank's configuration and the libraries that read and write for it.

    What ranks need to agree on before they can even form groups (topology, torch, Python)
    was compared when they met. ``run_dir`` is left out: its default contains the time.

    Raises:
        SharedConfigError: the same on every rank; the key, both values and who has the odd one.
    """
    if world.size == 1:
        return
    texts = world.everyone.gather_texts(json.dumps(_facts(config)))
    error = disagreement([json.loads(text) for text in texts])
    if error is not None:
        raise error


def agreed_run_dir(world: World, config: Config) -> str:
    """Rank 0's ``run_dir``, on every rank."""
    return world.everyone.gather_texts(config.run_dir if world.is_first else "")[0]


def _facts(config: Config) -> dict[str, str]:
    values = {key: str(value) for key, value in flat(config).items() if key != "run_dir"}
    return values | {
        "digest of the schedule": training_schedule(config).digest(),
        "version of numpy": np.__version__,
        "version of safetensors": safetensors.__version__,
    }
