"""The part of the model that this rank trains, and the dispatcher to the others' experts."""

from collections.abc import Sequence

import torch

from kimi_pretrain.config.schema import Config
from kimi_pretrain.model.build import rank_model
from kimi_pretrain.model.rank_model import RankModel
from kimi_pretrain.ops.registry import kernels_for
from kimi_pretrain.parallel.dispatch import Dispatcher
from kimi_pretrain.parallel.dispatchers import open_dispatcher
from kimi_pretrain.parallel.world import World
from kimi_pretrain.train.schedule import stages_of


def open_model(
    config: Config, placement: Sequence[int], dtype: torch.dtype, world: World
) -> tuple[RankModel, Dispatcher]:
    """The chunks that a schedule's ``placement`` gives this rank, and the dispatcher.

    Initial weights do not depend on the layout.

    Raises:
        ConfigError: the dispatcher or the kernels cannot run here.
    """
    parallel, row_bytes = config.parallel, config.model.hidden_size * dtype.itemsize
    kernels = kernels_for(config.kernels, world.device.type, dtype)
    dispatcher = open_dispatcher(parallel, world.ep, row_bytes, kernels)
    stages = {
        stage: layers
        for stage, layers in enumerate(stages_of(config))
        if placement[stage] == world.pp.index
    }
    model = rank_model(config.model, stages, dtype, world.device, config.seed, dispatcher, kernels)
    return model, dispatcher
