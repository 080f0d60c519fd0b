"""Any layout of real ranks trains as the plain model does in one process, in float64.

The oracle shares nothing with the sharded path but the model's operations: autograd's own
``.grad``, ``MuonClip`` as a torch optimizer, one process, one dispatcher. Held against each
other are the loss, the norm, every gradient, every updated parameter on every rank, every
moment, the router's biases and loads, to 1e-9 of a tensor's largest element, after the first
step and after the last.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch

from kimi_pretrain.config.schema import Config
from kimi_pretrain.model.build import from_config
from kimi_pretrain.model.causal_lm import CausalLM
from kimi_pretrain.model.names import hf_views
from kimi_pretrain.model.rank_model import RankModel
from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.optim.registry import build_optimizer
from kimi_pretrain.parallel.world import World, open_world
from kimi_pretrain.train.step import StepResult, TrainStep, to_device
from tests.distributed.ranks import run_ranks
from tests.distributed.setting import (
    LENGTH,
    RATE,
    SEQUENCES,
    batch,
    configuration,
    open_step,
    part_of,
    put_together,
)
from tests.optim.stage_cases import lent

LAYOUTS = [(2, 1), (2, 2), (4, 1), (4, 2), (4, 4), (8, 2), (8, 8)]  # (dp, ep)
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Scenario:
    """A run of some steps; ``cut`` False: one microbatch a rank, True: one a sequence.

    ``lends``: whether ranks orthogonalise expert matrices that another one holds.
    """

    name: str
    steps: int
    cut: bool
    skewed: bool
    overrides: tuple[str, ...]
    lends: bool = False

    @property
    def compared(self) -> tuple[int, ...]:
        """The steps after which everything is held against one process."""
        return tuple(sorted({1, self.steps}))


SCENARIOS = [
    Scenario("one microbatch, three steps", 3, False, False, ("optimizer.grad_clip=null",)),
    Scenario(
        "accumulated, three steps, clips fire, flat",
        3,
        True,
        False,
        (
            "optimizer.qk_clip_threshold=0.001",
            "optimizer.grad_clip=0.1",
            "parallel.dense_sharding=flat",
            "parallel.bucket_elements=4000",
        ),
    ),
    Scenario(
        "accumulated, three steps, clips fire, weights at experts, aligned",
        3,
        True,
        False,
        (
            "optimizer.qk_clip_threshold=0.001",
            "parallel.router_weights=before_down",
            "parallel.dense_sharding=aligned",
            "parallel.bucket_elements=4000",
        ),
    ),
    Scenario("one expert gets all, some get none", 1, True, True, ()),
    # Three dense matrices cost more than all else: K2's o_proj at 2,048 ranks, in small.
    Scenario(
        "one microbatch, three steps, clips fire, flat, lent",
        3,
        False,
        False,
        (
            "model.num_hidden_layers=2",
            "model.intermediate_size=2048",
            "optimizer.qk_clip_threshold=0.001",
            "optimizer.grad_clip=0.1",
            "parallel.dense_sharding=flat",
            "parallel.bucket_elements=4000",
        ),
        lends=True,
    ),
]


def configured(scenario: Scenario, dp: int = 1, ep: int = 1) -> Config:
    size = 1 if scenario.cut else SEQUENCES // dp
    return configuration(dp, ep, f"schedule.micro_batch_size={size}", *scenario.overrides)


def skew(model: CausalLM | RankModel) -> None:
    """Every token's first choice is expert 0; experts 5 to 7 are never chosen."""
    for name, buffer in model.hf_named_buffers():
        assert name.endswith("e_score_correction_bias")
        buffer[0], buffer[5:] = 10.0, -10.0


# --- the oracle -----------------------------------------------------------------------------


@lru_cache
def plain(scenario: Scenario) -> list[dict[str, Any]]:
    """What holds after each compared step of one process, with torch's autograd and a torch
    optimizer; the whole batch is one microbatch."""
    config = configured(scenario)
    torch.set_num_threads(1)
    model = from_config(config.model, dtype=torch.float64)
    if scenario.skewed:
        skew(model)
    optimizer = build_optimizer(config.optimizer, config.model, model.named_parameters())
    whole = to_device(batch(), slice(None), torch.device("cpu"))
    losses, norms, after = [], [], []
    for number in range(1, scenario.steps + 1):
        record = StepRecord.for_model(
            config.model,
            tau=config.optimizer.qk_clip_threshold,
            aux_scale=1.0,
            dtype=torch.float64,
        )
        optimizer.zero_grad()
        loss = model.loss(whole.tokens, whole.labels, record, whole.document_ids)
        loss.backward()
        parameters = list(model.parameters())
        norm = torch.stack([p.grad.norm() for p in parameters]).norm()
        limit = config.optimizer.grad_clip
        if limit is not None and norm > limit:
            for p in parameters:
                p.grad.mul_(limit / norm)
        for group in optimizer.param_groups:
            group["lr"] = RATE
        optimizer.observe_max_logits(record.max_logits, record.exact)
        optimizer.step()
        model.update_router_bias(record, config.optimizer.router_bias_rate)
        losses.append(float(loss.detach()))
        norms.append(float(norm.detach()))
        if number not in scenario.compared:
            continue
        state = {
            f"{kind}/{name}": view.clone()
            for internal, kind, tensor in optimizer.named_state()
            for name, view in hf_views(internal, tensor)
        }
        after.append(
            {
                "losses": list(losses),
                "norms": list(norms),
                "parameters": {n: p.clone() for n, p in model.hf_named_parameters()},
                "gradients": {n: g.clone() for n, g in model.hf_named_gradients()},
                "buffers": {n: b.clone() for n, b in model.hf_named_buffers()},
                "state": state,
                "counts": record.expert_counts,
                "max_logits": record.max_logits,
                "tokens": record.tokens,
                "clipped": optimizer.qk_clip_metrics["number_clipped"],
            }
        )
    return after


# --- the ranks ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """One rank's run: what holds after each compared step, and what its shards exchanged."""

    after: list[dict[str, Any]]
    travelling: set[str]  # kinds of buckets whose matrices travel
    lent: int  # expert matrices of the stage that another than their holder orthogonalises


def train_as_rank(rank: int, world_size: int, dp: int, ep: int) -> list[Seen]:
    """Every scenario in turn on this rank; what it holds of the result."""
    world = open_world(configured(SCENARIOS[0], dp, ep).parallel)
    assert (world.rank, world.size) == (rank, world_size)
    return [_run(scenario, configured(scenario, dp, ep), world) for scenario in SCENARIOS]


def _run(scenario: Scenario, config: Config, world: World) -> Seen:
    step = open_step(config, torch.float64, world)
    if scenario.skewed:
        skew(step.model)
    part = part_of(world)
    results: list[StepResult] = []
    after = []
    for number in range(1, scenario.steps + 1):
        results.append(step.run(number, part, RATE))
        if number in scenario.compared:
            step.optimizer.buffers.gathered()
            after.append(_held(step, results))
    optimizer = step.optimizer
    return Seen(
        after,
        {f"{s.bucket.kind} {s.bucket.group}" for s in optimizer.shards if s.travels},
        sum(lent(optimizer.buffers.layout).values()),
    )


def _held(step: TrainStep, results: list[StepResult]) -> dict[str, Any]:
    model, optimizer, last = step.model, step.optimizer, results[-1].record
    return {
        "losses": [r.loss for r in results],
        "norms": [r.grad_norm for r in results],
        "parameters": {n: p.clone() for n, p in model.hf_named_parameters()},
        "buffers": {n: b.clone() for n, b in model.hf_named_buffers()},
        "gradients": [p._replace(values=p.values.clone()) for p in optimizer.gradient_pieces()],
        "state": [p._replace(values=p.values.clone()) for p in optimizer.pieces()],
        "counts": last.expert_counts,
        "max_logits": last.max_logits,
        "clipped": optimizer.qk_clip_metrics["number_clipped"],
    }


@pytest.mark.parametrize(("dp", "ep"), LAYOUTS, ids=str)
def test_ranks_train_as_one_process(dp: int, ep: int) -> None:
    """Catches gradients scaled by ep or dp, a norm of each EP group, shards updated twice or
    never, matrices put together in the wrong order, heads clipped by a local maximum, counts
    of one rank, tokens combined with others' weights, a parameter never gathered, and a second
    step that starts from something else than the first one left."""
    everyone = run_ranks(dp, train_as_rank, dp, ep)
    for scenario, *ranks in zip(SCENARIOS, *everyone, strict=True):
        where = f"{scenario.name}, dp={dp} ep={ep}"
        for number, step in enumerate(scenario.compared):
            seen = [rank.after[number] for rank in ranks]
            _compare(f"{where}, step {step}", plain(scenario)[number], seen)
        if "parallel.dense_sharding=flat" in scenario.overrides:
            assert all("flat dp" in rank.travelling for rank in ranks), where
        if scenario.lends:
            assert all(rank.lent > 0 and "aligned edp" in rank.travelling for rank in ranks), where


def test_the_scenarios_do_what_they_say() -> None:
    """Catches a test of QK-Clip in which no head is clipped, or of skew without any."""
    last = {scenario.name: plain(scenario)[-1] for scenario in SCENARIOS}
    for name, found in last.items():
        assert ("clips fire" in name) == (found["clipped"] > 0), name
    for scenario in SCENARIOS:
        if "optimizer.grad_clip=0.1" in scenario.overrides:
            assert min(last[scenario.name]["norms"]) > 0.1
    counts = last["one expert gets all, some get none"]["counts"]
    assert (counts[:, 0] == SEQUENCES * LENGTH).all()
    assert (counts[:, 5:] == 0).all()


def _compare(where: str, want: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    for rank, got in enumerate(ranks):
        at = f"{where}, rank {rank}"
        np.testing.assert_allclose(got["losses"], want["losses"], rtol=TOLERANCE, err_msg=at)
        np.testing.assert_allclose(got["norms"], want["norms"], rtol=TOLERANCE, err_msg=at)
        assert torch.equal(got["counts"], want["counts"]), at
        assert got["clipped"] == want["clipped"], at
        close(f"{at}: max_logits", got["max_logits"], want["max_logits"])
        for name, buffer in got["buffers"].items():
            assert torch.equal(buffer, want["buffers"][name]), f"{at}: {name}"
        for name, parameter in got["parameters"].items():
            close(f"{at}: {name}", parameter, want["parameters"][name])
        assert (got["losses"], got["norms"]) == (ranks[0]["losses"], ranks[0]["norms"]), at
    held = {name for got in ranks for name in got["parameters"]}
    assert held == want["parameters"].keys(), where
    for what in ("gradients", "state"):
        whole = put_together([piece for got in ranks for piece in got[what]])
        if what == "state":
            whole = {key: t for key, t in whole.items() if not key.startswith("master/")}
        else:
            whole = {key.removeprefix("gradient/"): t for key, t in whole.items()}
        assert whole.keys() == want[what].keys(), where
        for key, tensor in whole.items():
            close(f"{where}: {what} {key}", tensor, want[what][key])


def close(what: str, got: torch.Tensor, want: torch.Tensor) -> None:
    apart = (got - want).abs()
    worst = int(apart.argmax())
    scale = float(want.abs().max())
    assert float(apart.max()) <= TOLERANCE * scale, (
        f"{what}[{worst}]: {float(got.flatten()[worst])!r}, "
        f"one process {float(want.flatten()[worst])!r} (largest {scale:.3g})"
    )
