"""What else holds for a step of several ranks: guards, memory, replicas, repetition."""

from typing import Any

import pytest
import torch

from kimi_pretrain.pipeline.execute import Work
from kimi_pretrain.train.guards import GuardStop
from tests.distributed.ranks import run_ranks
from tests.distributed.setting import RATE, configuration, open_step, part_of, put_together


def poisoned(rank: int, world_size: int) -> tuple[str, bool]:
    """Rank 3's gradient of one expert gets an infinity between two microbatches."""
    config = configuration(world_size, 2, "precision=bf16", "parallel.dense_sharding=flat")
    step = open_step(config, torch.bfloat16)
    part = part_of(step.world)
    step.run(1, part, RATE)
    step.optimizer.buffers.gathered()
    before = _everything(step)
    chunk = step.model.chunks[0]
    run, calls = chunk.lm_head.forward, []

    def poison(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if rank == 3 and len(calls) == 2:
            stack = chunk.get_parameter("model.layers.2.mlp.experts.gate_up_proj")
            stack.main_grad[1, 0, 3, 4] = float("inf")  # type: ignore[attr-defined]
        result: torch.Tensor = run(*arguments)
        return result

    chunk.lm_head.forward = poison  # type: ignore[method-assign]
    with pytest.raises(GuardStop) as stopped:
        step.run(2, part, RATE)
    same = all(torch.equal(a, b) for a, b in zip(before, _everything(step), strict=True))
    return str(stopped.value), same and step.optimizer.steps == 1


def _everything(step: Any) -> list[torch.Tensor]:
    chunks = step.model.chunks.values()
    weights = [t for chunk in chunks for t in (*chunk.parameters(), *chunk.buffers())]
    return [t.detach().clone() for t in [*weights, *(p.values for p in step.optimizer.pieces())]]


def test_an_infinity_on_one_rank_stops_all_and_is_named() -> None:
    """Catches a verdict of one EP group, an update on the ranks that saw nothing, and a message
    that names the sum's owner instead of the rank it came from."""
    messages, unchanged = zip(*run_ranks(4, poisoned), strict=True)
    assert len(set(messages)) == 1
    # ep index 1 holds experts 4 to 7: its second one is expert 5
    assert "rank 3: model.layers.2.mlp.experts.5.gate_proj.weight" in messages[0]
    assert "rank 0" not in messages[0]
    assert "rank 1" not in messages[0]
    assert all(unchanged)


def poisoned_stages(rank: int, world_size: int) -> list[tuple[str, bool]]:
    """A gradient of rank 2, on the last stages, is lost; then one of rank 1 too, on the first."""
    pipeline = ("parallel.pp=2", "parallel.vpp=2", "parallel.schedule=k2")
    step = open_step(configuration(2, 2, *pipeline), torch.float64)
    part = part_of(step.world)
    step.run(1, part, RATE)
    step.optimizer.buffers.gathered()
    before = _everything(step)
    run, bad = step.executor.run, {2: "inf"}

    def poison(work: Work) -> None:
        if rank in bad:
            layer = {1: 2, 2: 3}[rank]
            name = f"model.layers.{layer}.mlp.experts.gate_up_proj"
            stack = step.model.chunks[layer].get_parameter(name)
            stack.main_grad[1, 0, 3, 4] = float(bad[rank])  # type: ignore[attr-defined]
        run(work)

    step.executor.run = poison  # type: ignore[method-assign]
    found = []
    for _ in range(2):
        with pytest.raises(GuardStop) as stopped:
            step.run(2, part, RATE)
        same = all(torch.equal(a, b) for a, b in zip(before, _everything(step), strict=True))
        found.append((str(stopped.value), same and step.optimizer.steps == 1))
        bad[1] = "nan"
    return found


def test_stages_stop_together_and_name_what_each_of_them_lost() -> None:
    """Catches a verdict of one stage's gradients alone: another would update its layers."""
    one, both = zip(*run_ranks(4, poisoned_stages), strict=True)
    assert len(set(one)) == len(set(both)) == 1
    (message, unchanged), (messages, still_unchanged) = one[0], both[0]
    # the second expert of ep index 0 (rank 2), and of ep index 1 (rank 1)
    assert "rank 2: model.layers.3.mlp.experts.1.gate_proj.weight" in message
    assert "rank 2: model.layers.3.mlp.experts.1.gate_proj.weight" in messages
    assert "rank 1: model.layers.2.mlp.experts.5.gate_proj.weight" in messages
    assert (message.count("rank "), messages.count("rank ")) == (1, 2)
    assert unchanged
    assert still_unchanged


def train_bf16(rank: int, world_size: int, ep: int, *overrides: str) -> dict[str, Any]:
    """Two steps, twice over; weights, state, losses and norms of both times."""
    config = configuration(world_size, ep, "precision=bf16", *overrides)
    world = None
    runs = []
    for _ in range(2):
        step = open_step(config, torch.bfloat16, world)
        world = step.world
        part = part_of(world)
        results = [step.run(number, part, RATE) for number in (1, 2)]
        step.optimizer.buffers.gathered()
        runs.append(([(r.loss, r.grad_norm) for r in results], _everything(step)))
    (figures, first), (figures_again, again) = runs
    return {
        "figures": figures,
        "repeats": figures == figures_again
        and all(torch.equal(a, b) for a, b in zip(first, again, strict=True)),
        "parameters": {name: p.clone() for name, p in step.model.hf_named_parameters()},
        "pieces": [tuple(piece) for piece in step.optimizer.pieces()],
        "state_bytes": sum(
            shard.master.nbytes + sum(t.nbytes for t in shard.state.values())
            for shard in step.optimizer.shards
        ),
        "layout": step.optimizer.buffers.layout,
    }


@pytest.mark.parametrize("sharding", ["flat", "aligned"])
def test_bf16_ranks_repeat_and_agree(sharding: str) -> None:
    """Catches sums in the order of arrival, losses and norms that differ in their last bits from
    rank to rank, replicas that drift apart, parameters that are not their masters rounded, and
    optimizer state that is held twice."""
    ranks = run_ranks(4, train_bf16, 2, f"parallel.dense_sharding={sharding}")
    assert all(got["repeats"] for got in ranks)
    assert all(got["figures"] == ranks[0]["figures"] for got in ranks)
    whole = put_together([piece for got in ranks for piece in got["pieces"]])
    masters = {k.removeprefix("master/"): t for k, t in whole.items() if k.startswith("master/")}
    held = set()
    for got in ranks:
        for name, parameter in got["parameters"].items():
            assert torch.equal(parameter, masters[name].bfloat16()), name
            held.add(name)
    assert held == masters.keys()

    # Muon: 4 B master and 4 B momentum a parameter, once over the replicas. AdamW: 12 B.
    elements = sum(t.numel() for t in masters.values())
    with_momentum = sum(t.numel() for k, t in whole.items() if k.startswith("momentum/"))
    needed = 8 * with_momentum + 12 * (elements - with_momentum)
    total = sum(got["state_bytes"] for got in ranks)
    layout = ranks[0]["layout"]
    padding = sum(
        (12 if bucket.kind == "adamw" else 8)
        * bucket.padding
        * (layout.ep if bucket.group == "edp" else 1)
        for bucket in layout.buckets
    )
    assert total == needed + padding
    # Even shards are padded by a few elements, whole matrices by less than one a rank and bucket.
    assert padding <= (12 * 4 * 20 if sharding == "flat" else 0.25 * needed)


def test_moments_cover_every_parameter() -> None:
    """Catches a parameter without state, which would train with its first gradient only."""
    ranks = run_ranks(2, train_bf16, 1)
    whole = put_together([piece for got in ranks for piece in got["pieces"]])
    kinds: dict[str, set[str]] = {}
    for key in whole:
        kind, _, name = key.partition("/")
        kinds.setdefault(name, set()).add(kind)
    assert {frozenset(k) for k in kinds.values()} == {
        frozenset({"master", "momentum"}),
        frozenset({"master", "exp_avg", "exp_avg_sq"}),
    }
