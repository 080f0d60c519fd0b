"""A run of several ranks goes on at the same layout bitwise, at any other to 1e-9, from tensors
that are bit for bit those that were saved; and any layout exports the same model."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kimi_pretrain.checkpoint.export import export
from kimi_pretrain.checkpoint.state import restore, snapshot
from kimi_pretrain.checkpoint.writer import CheckpointWriter
from kimi_pretrain.cli import main
from kimi_pretrain.config import compose
from kimi_pretrain.telemetry.jsonl import TIMING_FIELDS
from kimi_pretrain.train.step import TrainStep
from tests.distributed.ranks import run_ranks
from tests.distributed.setting import RATE, configuration, open_step, part_of, put_together

STEPS, HALF = 6, 3


def train_as_rank(
    rank: int, world_size: int, run_dir: str, ep: int, steps: int, pp: int = 1, vpp: int = 1
) -> int:
    """The whole program on this rank; its exit code."""
    from kimi_pretrain.train.loop import train

    return train(
        compose(
            [
                "experiment=smoke",
                "precision=fp64",
                "model.n_routed_experts=8",
                "schedule.global_batch_size=8",
                "schedule.micro_batch_size=1",
                f"schedule.max_steps={steps}",
                f"schedule.checkpoint_interval={HALF}",
                "schedule.eval_interval=3",
                "schedule.sample_tokens=4",
                "optimizer.qk_clip_threshold=1.0",
                "data.sequence_length=32",
                "logging.layer_interval=1",
                "logging.report=false",
                "logging.console=off",
                f"run_dir={run_dir}",
                f"parallel.dp={world_size // pp}",
                f"parallel.ep={ep}",
                f"parallel.pp={pp}",
                f"parallel.vpp={vpp}",
                f"parallel.schedule={'none' if pp == 1 else 'k2'}",
                "parallel.bucket_elements=5000",
            ]
        )
    )


def _train(run_dir: Path, dp: int, ep: int, steps: int) -> None:
    assert run_ranks(dp, train_as_rank, str(run_dir), ep, steps, timeout=240) == [0] * dp


def _rows(run_dir: Path, name: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / name).read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in TIMING_FIELDS} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    _train(run_dir, 4, 2, STEPS)
    return run_dir


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "half"
    _train(run_dir, 4, 2, HALF)
    return run_dir


def test_the_same_layout_goes_on_bitwise(tmp_path: Path, uninterrupted: Path, half: Path) -> None:
    """Catches a shard that a checkpoint forgets, and sums that depend on who came first."""
    run_dir = tmp_path / "run"
    shutil.copytree(half, run_dir)
    (run_dir / "summary.json").unlink()
    _train(run_dir, 4, 2, STEPS)
    for name in ("metrics.jsonl", "evals.jsonl", "layers.jsonl"):
        assert _rows(run_dir, name) == _rows(uninterrupted, name), name
    last = f"checkpoints/step-{STEPS:08d}"
    files = sorted(path.name for path in (uninterrupted / last).iterdir())
    assert len([name for name in files if name.startswith("optimizer-")]) == 4
    for name in files:
        assert (run_dir / last / name).read_bytes() == (uninterrupted / last / name).read_bytes()


def test_a_checkpoint_is_told_with_the_step_after_it(uninterrupted: Path) -> None:
    """Catches a checkpoint that holds up a run unseen, and one counted in a step's own time."""
    lines = (uninterrupted / "metrics.jsonl").read_text().splitlines()
    told = {row["step"]: row["checkpoint_seconds"] for row in map(json.loads, lines)}
    assert [step for step, seconds in told.items() if seconds > 0] == [HALF + 1]


def lose_rank_3(rank: int, world_size: int, run_dir: str) -> str:
    """Rank 3 dies with half of its second checkpoint to write; what the others raise."""
    import kimi_pretrain.checkpoint.writer as writer
    from kimi_pretrain.parallel.errors import PeerError

    plain, calls = writer.write, []

    def dying(directory: Path, share: Any) -> list[str]:
        calls.append(1)
        if len(calls) == 2:
            (directory / "weights-00004-of-00004.safetensors").write_bytes(b"half")
            os._exit(1)
        return plain(directory, share)

    if rank == 3:
        writer.write = dying
    try:
        train_as_rank(rank, world_size, run_dir, 2, STEPS)
    except PeerError as error:
        return str(error)
    return "done"


def test_a_rank_lost_while_ranks_write_costs_one_checkpoint(
    tmp_path: Path, uninterrupted: Path
) -> None:
    """Catches a checkpoint of three ranks in four, and the loss of a peer (exit code 4) that
    ends as a defect: rank 0's wait for the part that never comes hides it."""
    run_dir = tmp_path / "run"
    told = run_ranks(4, lose_rank_3, str(run_dir), lost=(3,), timeout=240)
    assert all(line and line != "done" for line in told[:3])
    assert [path.name for path in (run_dir / "checkpoints").glob("step-*")] == [f"step-{HALF:08d}"]
    _train(run_dir, 4, 2, STEPS)
    for name in ("metrics.jsonl", "evals.jsonl", "layers.jsonl"):
        assert _rows(run_dir, name) == _rows(uninterrupted, name), name


def resume_with_a_late_listing(rank: int, world_size: int, run_dir: str) -> int:
    """Rank 1's file system does not list the checkpoints yet."""
    import kimi_pretrain.train.resume as resume

    if rank == 1:
        resume.list_checkpoints = lambda root: []
    return train_as_rank(rank, world_size, run_dir, 1, HALF + 1)


def test_ranks_go_on_from_what_rank_0_finds(tmp_path: Path, half: Path) -> None:
    """Catches a rank that starts over beside others that resume."""
    run_dir = tmp_path / "run"
    shutil.copytree(half, run_dir)
    (run_dir / "summary.json").unlink()
    assert run_ranks(2, resume_with_a_late_listing, str(run_dir), timeout=120) == [0, 0]
    steps = [row["step"] for row in _rows(run_dir, "metrics.jsonl")]
    assert steps == list(range(1, HALF + 2))


@pytest.mark.parametrize(("dp", "ep"), [(1, 1), (2, 1), (4, 4), (8, 2)], ids=str)
def test_another_layout_goes_on_with_the_same_losses(
    tmp_path: Path, uninterrupted: Path, half: Path, dp: int, ep: int
) -> None:
    """Catches tensors put together in another order, moments left at zero, and a batch that
    depends on the number of ranks."""
    run_dir = tmp_path / "run"
    shutil.copytree(half, run_dir)
    (run_dir / "summary.json").unlink()
    _train(run_dir, dp, ep, STEPS)
    got, want = _rows(run_dir, "metrics.jsonl"), _rows(uninterrupted, "metrics.jsonl")
    assert [row["step"] for row in got] == list(range(1, STEPS + 1))
    for ours, theirs in zip(got, want, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9), ours["step"]
    for ours, theirs in zip(
        _rows(run_dir, "evals.jsonl"), _rows(uninterrupted, "evals.jsonl"), strict=True
    ):
        assert ours["heldout_loss"] == pytest.approx(theirs["heldout_loss"], rel=1e-9)
        assert ours["domains"] == pytest.approx(theirs["domains"], rel=1e-9)
    loads = [_rows(path, "layers.jsonl")[-1]["expert_load"] for path in (run_dir, uninterrupted)]
    assert loads[0] == loads[1]
    ours, theirs = (_exported(path, tmp_path / path.name) for path in (run_dir, uninterrupted))
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        apart = float((ours[name] - tensor).abs().max())
        assert apart <= 1e-9 * float(tensor.abs().max()), name


def _exported(run_dir: Path, to: Path) -> dict[str, torch.Tensor]:
    """The Hugging Face checkpoint that the command makes of a run's last one."""
    assert main(["ckpt", "export", str(run_dir), str(to / "hf")]) == 0
    return load_file(to / "hf" / "model.safetensors")


# --- bf16, whose masters are tensors of their own --------------------------------------------

TAKEN = 2  # steps before the checkpoint


def _bf16_step(world_size: int, ep: int) -> TrainStep:
    overrides = ("precision=bf16", "parallel.bucket_elements=5000")
    return open_step(configuration(world_size, ep, *overrides), torch.bfloat16)


def save_as_rank(rank: int, world_size: int, root: str, ep: int) -> list[Any]:
    """Train, save; this rank's pieces as they are in memory."""
    step = _bf16_step(world_size, ep)
    part = part_of(step.world)
    for number in range(1, TAKEN + 1):
        step.run(number, part, RATE)
    state = {"step": TAKEN, "dtype": str(torch.bfloat16)}
    writer = CheckpointWriter(Path(root), 1, rank, world_size)
    writer.save(TAKEN, snapshot(step.model, step.optimizer, state, rank, world_size))
    writer.close()
    return list(step.optimizer.pieces())


def load_as_rank(
    rank: int, world_size: int, root: str, ep: int
) -> tuple[list[Any], dict[str, torch.Tensor], int]:
    """Load; this rank's pieces, its parameters, and how many steps it takes for done."""
    step = _bf16_step(world_size, ep)
    restore(next(Path(root).glob("step-*")), step.model, step.optimizer)
    step.optimizer.buffers.gathered()
    return list(step.optimizer.pieces()), _parameters(step), step.optimizer.steps


def _parameters(step: TrainStep) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in step.model.hf_named_parameters()}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A checkpoint of four ranks in two expert-parallel pairs, and what they held."""
    root = tmp_path_factory.mktemp("bf16")
    held = put_together([p for got in run_ranks(4, save_as_rank, str(root), 2) for p in got])
    masters = {k: t for k, t in held.items() if k.startswith("master/")}
    assert all(bool((t != t.bfloat16()).any()) for k, t in masters.items() if "norm" not in k)
    assert all(bool(t.any()) for t in held.values())
    return root, held


@pytest.mark.parametrize(("dp", "ep"), [(8, 2), (2, 1), (4, 4)], ids=str)
def test_another_layout_holds_the_very_tensors(
    saved: tuple[Path, dict[str, torch.Tensor]], dp: int, ep: int
) -> None:
    """Catches a master rounded on its way, a moment under another's name, a replica whose
    parameters do not follow, and elements that one cut has and another has not."""
    root, held = saved
    ranks = run_ranks(dp, load_as_rank, str(root), ep)
    found = put_together([piece for pieces, _, _ in ranks for piece in pieces])
    assert found.keys() == held.keys()
    for key, tensor in held.items():
        assert found[key].dtype == tensor.dtype == torch.float32, key
        assert torch.equal(found[key], tensor), key
    for _, parameters, steps in ranks:
        assert steps == TAKEN
        for name, parameter in parameters.items():
            assert torch.equal(parameter, held[f"master/{name}"].bfloat16()), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_export_of_expert_parallel_ranks_is_their_masters(
    tmp_path: Path, saved: tuple[Path, dict[str, torch.Tensor]], dtype: torch.dtype
) -> None:
    """Catches experts of the second rank that are exported as the first one's, gate taken for
    up, and a rounding of what was rounded."""
    root, held = saved
    (checkpoint,) = root.glob("step-*")
    export(checkpoint, configuration(4, 2).model, tmp_path, dtype)
    exported = load_file(tmp_path / "model.safetensors")
    masters = {k.removeprefix("master/"): t for k, t in held.items() if k.startswith("master/")}
    biases = {name for name in exported if name.endswith("e_score_correction_bias")}
    assert biases
    assert exported.keys() - biases == masters.keys()
    for name, tensor in masters.items():
        assert torch.equal(exported[name], tensor.to(dtype)), name


def test_another_pipeline_goes_on_with_the_same_losses(tmp_path: Path, uninterrupted: Path) -> None:
    """Catches a stage's tensors that another cut of the layers does not find: two ranks of two
    stages, then one process, then four stages."""
    run_dir = tmp_path / "run"
    for world, ep, steps, pp, vpp in [(4, 2, 2, 2, 2), (1, 1, 4, 1, 1), (4, 1, STEPS, 4, 1)]:
        (run_dir / "summary.json").unlink(missing_ok=True)
        arguments = (str(run_dir), ep, steps, pp, vpp)
        assert run_ranks(world, train_as_rank, *arguments, timeout=240) == [0] * world
    got, want = _rows(run_dir, "metrics.jsonl"), _rows(uninterrupted, "metrics.jsonl")
    assert [row["step"] for row in got] == list(range(1, STEPS + 1))
    for ours, theirs in zip(got, want, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9), ours["step"]
    ours, theirs = (_rows(path, "evals.jsonl")[-1] for path in (run_dir, uninterrupted))
    assert ours["step"] == theirs["step"] == STEPS
    assert ours["heldout_loss"] == pytest.approx(theirs["heldout_loss"], rel=1e-9)
    summaries = [json.loads((d / "summary.json").read_text()) for d in (run_dir, uninterrupted)]
    assert summaries[0]["sample"] == summaries[1]["sample"]
