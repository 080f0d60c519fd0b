"""The sharded optimizer's checkpoints over real ranks: from layout to layout and out."""

import zlib
from pathlib import Path

import torch
from torch import Tensor

import kimi_pretrain
from kimi_pretrain.checkpoint.export import export
from kimi_pretrain.checkpoint.state import restore, snapshot
from kimi_pretrain.checkpoint.store import list_checkpoints, ranks, read_manifest, verify
from kimi_pretrain.checkpoint.writer import CheckpointWriter
from kimi_pretrain.config import compose
from kimi_pretrain.config.schema import Config
from kimi_pretrain.parallel.world import open_world
from kimi_pretrain.train.step import TrainStep
from tests.distributed.ranks import run_ranks

STEPS = 9


def _config(dp: int, ep: int, pp: int = 1) -> Config:
    """With stages, two a rank, of one layer each."""
    stages = (f"parallel.pp={pp}", "parallel.vpp=2", "parallel.schedule=k2") if pp > 1 else ()
    return compose(
        [
            "experiment=smoke",
            "run_dir=unused",
            "model.n_routed_experts=4",
            "schedule.micro_batch_size=1",
            f"parallel.dp={dp}",
            f"parallel.ep={ep}",
            "parallel.bucket_elements=4000",
            "parallel.timeout_seconds=60",
            *stages,
        ]
    )


def _value(kind: str, name: str, shape: tuple[int, ...]) -> Tensor:
    """What a tensor of the state holds: a function of its name, with more bits than bf16 has."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{kind}/{name}".encode()))
    return torch.randn(shape, generator=generator)


def pass_on(rank: int, world_size: int, dp: int, ep: int, pp: int, source: str, target: str) -> int:
    """Load `source` at this layout (without one, fill the state), check it, save it as `target`.

    Returns how many elements this rank holds.
    """
    config = _config(dp, ep, pp)
    world = open_world(config.parallel)
    step = TrainStep.open(config, torch.bfloat16, world)
    model, optimizer = step.model, step.optimizer
    if source:
        (directory,) = list_checkpoints(Path(source))
        state = restore(directory, model, optimizer)
        assert state["note"] == "kept"
    else:
        for kind, name, shape, start, values in optimizer.pieces():
            values.copy_(_value(kind, name, shape).view(-1)[start : start + values.numel()])
        for name, buffer in model.hf_named_buffers():
            buffer.copy_(_value("buffer", name, tuple(buffer.shape)))
        optimizer.steps, optimizer.last_clipped_step = STEPS, 4
        optimizer.publish()
    optimizer.buffers.gathered()
    assert (optimizer.steps, optimizer.last_clipped_step) == (STEPS, 4)
    for name, parameter in model.hf_named_parameters():
        want = _value("master", name, tuple(parameter.shape)).bfloat16()
        assert torch.equal(parameter, want), name
    for name, buffer in model.hf_named_buffers():
        assert torch.equal(buffer, _value("buffer", name, tuple(buffer.shape))), name
    held = 0
    for kind, name, shape, start, values in optimizer.pieces():
        want = _value(kind, name, shape).view(-1)[start : start + values.numel()]
        assert torch.equal(values, want), (kind, name)
        held += values.numel()
    writer = CheckpointWriter(Path(target), 2, rank, world_size, deadline=60.0)
    state = {"step": STEPS, "dtype": "torch.bfloat16", "note": "kept"}
    writer.save(STEPS, snapshot(model, optimizer, state, rank, world_size, world.dp.index == 0))
    writer.close()
    return held


def test_a_checkpoint_passes_through_every_layout(tmp_path: Path) -> None:
    """Catches experts or layers numbered from 0 on every rank, padding of flat shards saved as
    elements, parameters of some replicas and router biases of some stages that do not follow,
    and an export that knows one layout only."""
    source, held = "", set()
    layouts = [(4, 2, 1), (2, 1, 1), (2, 2, 2), (4, 4, 1), (1, 1, 1), (1, 1, 2), (2, 2, 1)]
    for number, (dp, ep, pp) in enumerate(layouts):
        target = tmp_path / f"{number}"
        held.add(sum(run_ranks(dp * pp, pass_on, dp, ep, pp, source, str(target))))
        (directory,) = list_checkpoints(target)
        verify(directory)
        assert ranks(read_manifest(directory)) == dp * pp
        out = tmp_path / f"export-{number}"
        export(directory, _config(dp, ep, pp).model, out)
        model = kimi_pretrain.from_hf(out, dtype=torch.bfloat16)
        for name, parameter in model.hf_named_parameters():
            assert torch.equal(
                parameter, _value("master", name, tuple(parameter.shape)).bfloat16()
            ), name
        source = str(target)
    assert len(held) == 1  # every element once, at every layout
