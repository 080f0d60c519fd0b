"""Pipelines of real ranks train as the plain model does in one process, in float64."""

from typing import Any

import pytest
import torch

from kimi_pretrain.config.schema import Config
from kimi_pretrain.parallel.world import open_world
from tests.distributed.ranks import run_ranks
from tests.distributed.setting import RATE, configuration, open_step, part_of, put_together
from tests.distributed.test_parity import Scenario, close, plain

# (pp, vpp, edp x ep, ep)
SHAPES = [
    (2, 1, 1, 1),
    (2, 2, 1, 1),
    (4, 1, 1, 1),
    (4, 2, 1, 1),
    (2, 2, 2, 2),
    (2, 1, 4, 2),
    (2, 4, 2, 1),
]
UNEVEN = 9  # layers, on every number of stages here


def scenario(layers: int) -> Scenario:
    common = (
        f"model.num_hidden_layers={layers}",
        "optimizer.qk_clip_threshold=0.001",
        "optimizer.grad_clip=0.1",
        "parallel.bucket_elements=4000",
    )
    return Scenario("pipeline", 2, True, False, common)


def configured(pp: int, vpp: int, dp: int, ep: int, schedule: str, layers: int) -> Config:
    return configuration(
        dp,
        ep,
        *scenario(layers).overrides,
        f"parallel.pp={pp}",
        f"parallel.vpp={vpp}",
        f"parallel.schedule={schedule}",
    )


def cases(pp: int, vpp: int) -> list[tuple[str, int]]:
    """(schedule, layers): those that issue 4 names, and the others that fit."""
    plain_one = "1f1b" if vpp == 1 else "interleaved_1f1b"
    others = {1: ["zb_h1"], 2: ["gpipe", "dualpipe_v"]}.get(vpp, ["gpipe"])
    even = max(4, pp * vpp)
    both = [(schedule, layers) for layers in (UNEVEN, even) for schedule in (plain_one, "k2")]
    return [*both, *((schedule, UNEVEN) for schedule in others)]


def train_as_rank(
    rank: int, world_size: int, pp: int, vpp: int, dp: int, ep: int
) -> list[dict[str, Any]]:
    world, results = None, []
    for schedule, layers in cases(pp, vpp):
        config = configured(pp, vpp, dp, ep, schedule, layers)
        world = world or open_world(config.parallel)
        step = open_step(config, torch.float64, world)
        part = part_of(world)
        before = dict(world.ep.traffic.calls)
        outcomes = [step.run(number + 1, part, RATE) for number in range(scenario(layers).steps)]
        step.optimizer.buffers.gathered()
        last = outcomes[-1].record
        moe = [layer for c in step.model.chunks.values() for layer in c.model.layers.values()]
        calls = world.ep.traffic.calls.get("all_to_all", 0) - before.get("all_to_all", 0)
        results.append(
            {
                "losses": [o.loss for o in outcomes],
                "norms": [o.grad_norm for o in outcomes],
                "parameters": {n: p.clone() for n, p in step.model.hf_named_parameters()},
                "buffers": {n: b.clone() for n, b in step.model.hf_named_buffers()},
                "gradients": [tuple(p) for p in step.optimizer.gradient_pieces()],
                "state": [tuple(p) for p in step.optimizer.pieces()],
                "counts": last.expert_counts,
                "max_logits": last.max_logits,
                "tokens": last.tokens,
                "calls": calls,
                "wanted calls": 4
                * sum(layer.router is not None for layer in moe)
                * len(part.tokens)
                * scenario(layers).steps
                * (ep > 1),
            }
        )
    return results


@pytest.mark.parametrize(("pp", "vpp", "dp", "ep"), SHAPES, ids=str)
def test_pipelines_train_as_one_process(pp: int, vpp: int, dp: int, ep: int) -> None:
    """Catches activations and gradients of another microbatch or stage, weight gradients lost or
    counted twice, layers that no stage has, losses of other stages, and communication that a
    schedule adds."""
    everyone = run_ranks(pp * dp, train_as_rank, pp, vpp, dp, ep, timeout=240)
    for number, (schedule, layers) in enumerate(cases(pp, vpp)):
        want = plain(scenario(layers))[-1]
        ranks = [results[number] for results in everyone]
        where = f"{schedule} pp={pp} vpp={vpp} dp={dp} ep={ep}, {layers} layers"
        for rank, got in enumerate(ranks):
            at = f"{where}, rank {rank}"
            assert got["losses"] == pytest.approx(want["losses"], rel=1e-9), at
            assert got["norms"] == pytest.approx(want["norms"], rel=1e-9), at
            assert torch.equal(got["counts"], want["counts"]), at
            close(f"{at}: max_logits", got["max_logits"], want["max_logits"])
            assert got["tokens"] == want["tokens"], at
            assert got["calls"] == got["wanted calls"], at
            for name, buffer in got["buffers"].items():
                assert torch.equal(buffer, want["buffers"][name]), f"{at}: {name}"
            for name, parameter in got["parameters"].items():
                close(f"{at}: {name}", parameter, want["parameters"][name])
        assert {n for got in ranks for n in got["parameters"]} == want["parameters"].keys()
        for what, kind in (("gradients", "gradient/"), ("state", "")):
            whole = put_together([piece for got in ranks for piece in got[what]])
            whole = {k.removeprefix(kind): t for k, t in whole.items() if "master/" not in k}
            assert whole.keys() == want[what].keys(), where
            for key, tensor in whole.items():
                close(f"{where}: {what} {key}", tensor, want[what][key])
    for plain_one in (0, 2):  # of both numbers of layers; k2 is the next
        for results in everyone:
            _same_bits(*results[plain_one : plain_one + 2])


def _same_bits(first: dict[str, Any], k2: dict[str, Any]) -> None:
    """K2's schedule computes what 1F1B's does, only at other times."""
    assert first["losses"] == k2["losses"]
    for name, parameter in first["parameters"].items():
        assert torch.equal(parameter, k2["parameters"][name]), name
    for ours, theirs in zip(first["gradients"], k2["gradients"], strict=True):
        assert torch.equal(ours[-1], theirs[-1]), ours[1]
