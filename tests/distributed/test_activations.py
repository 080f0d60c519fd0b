"""Activation policies over real ranks of pipeline and expert parallel: the same bits as none."""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from kimi_pretrain.activation.handles import Chain, Fp8Tile, Ref
from kimi_pretrain.config.activation import GRADIENTS, PRESETS, TAGS, WAITING
from kimi_pretrain.config.schema import Config
from kimi_pretrain.config.settled import micro_batch_size
from kimi_pretrain.parallel.world import World, open_world
from kimi_pretrain.pipeline.actions import Schedule
from kimi_pretrain.pipeline.execute import Executor, Work
from kimi_pretrain.pipeline.passes import insert_recompute
from kimi_pretrain.plan.activations import Setting, stage_kept
from kimi_pretrain.plan.in_flight import held_along
from kimi_pretrain.train.schedule import stages_of
from kimi_pretrain.train.step import TrainStep
from tests.distributed.ranks import run_ranks
from tests.distributed.setting import LENGTH, RATE, configuration, open_step, part_of

Policy = Mapping[str, str]

RECOMPUTE = {tag: "recompute" for tag, allowed in TAGS.items() if "recompute" in allowed}
POLICIES: dict[str, Policy] = {
    "recompute": RECOMPUTE,
    "offload": dict.fromkeys(TAGS, "offload"),
    "k2 without FP8": {tag: text.replace("fp8+", "") for tag, text in PRESETS["k2"].items()},
}
SCHEDULES = [("1f1b", 1), ("interleaved_1f1b", 2), ("k2", 2)]
TWO_BY_TWO = (2, 2)  # pp, ep
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def configured(
    schedule: str, vpp: int, tags: Policy, *overrides: str, grid: tuple[int, int] = TWO_BY_TWO
) -> Config:
    policy = [f"+activation.tags.{tag}={text}" for tag, text in tags.items()]
    pp, ep = grid
    return configuration(
        ep,
        ep,
        f"parallel.pp={pp}",
        f"parallel.vpp={vpp}",
        f"parallel.schedule={schedule}",
        f"activation={'custom' if tags else 'none'}",
        "optimizer.qk_clip_threshold=0.001",
        "parallel.router_weights=before_down",
        *policy,
        *overrides,
    )


def trained(config: Config, dtype: torch.dtype, world: World, steps: int = 2) -> dict[str, Any]:
    step = open_step(config, dtype, world)
    gradients: dict[str, Tensor] = {}
    run = step.executor.run

    def accumulate(work: Work) -> None:
        run(work)
        gradients.update((name, g.clone()) for name, g in step.model.hf_named_gradients())

    step.executor.run = accumulate  # type: ignore[method-assign]
    outcomes = [step.run(number + 1, part_of(world), RATE) for number in range(steps)]
    step.optimizer.buffers.gathered()
    offloader = step.executor.activations.offloader
    row = step.executor.schedule.ranks[world.pp.index]
    return {
        "losses": [outcome.loss for outcome in outcomes],
        "norms": [outcome.grad_norm for outcome in outcomes],
        "counts": outcomes[-1].record.expert_counts,
        "gradients": gradients,  # of the last step, fp32 sums over this rank's microbatches
        "parameters": {name: p.clone() for name, p in step.model.hf_named_parameters()},
        "moved": None if offloader is None else (offloader.moved.out, offloader.moved.back),
        "offloads": sum("OFFLOAD" in str(node) for node in row),
        "left": None if offloader is None else offloader.slab.spans.used,
    }


def train_with_each(
    rank: int, world_size: int, schedule: str, vpp: int, grid: tuple[int, int]
) -> list[dict[str, Any]]:
    world, results = None, []
    for dtype in DTYPES:
        for tags in ({}, *POLICIES.values()):
            config = configured(schedule, vpp, tags, grid=grid)
            world = world or open_world(config.parallel)
            results.append(trained(config, dtype, world))
    return results


@pytest.mark.parametrize(
    ("schedule", "vpp", "grid"),
    [*((name, vpp, TWO_BY_TWO) for name, vpp in SCHEDULES), ("1f1b", 1, (4, 1))],
)
def test_no_policy_changes_a_bit(schedule: str, vpp: int, grid: tuple[int, int]) -> None:
    """Catches a tensor that comes back late, another microbatch's, or computed otherwise."""
    pp, ep = grid
    ranks = run_ranks(4, train_with_each, schedule, vpp, grid, timeout=240)
    for rank, results in enumerate(ranks):
        results = iter(results)
        # 1F1B keeps pp - p microbatches on pipeline rank p: two have no time to be away.
        leaves = schedule != "1f1b" or pp - rank // ep > 2
        for dtype in DTYPES:
            want = next(results)
            assert all(gradient.any() for gradient in want["gradients"].values())
            for name in POLICIES:
                got, at = next(results), f"{schedule}, {name} in {dtype}, rank {rank}"
                assert got["losses"] == want["losses"], at
                assert got["norms"] == want["norms"], at
                assert torch.equal(got["counts"], want["counts"]), at
                for kind in ("gradients", "parameters"):
                    for key, tensor in got[kind].items():
                        assert torch.equal(tensor, want[kind][key]), f"{at}: {kind} {key}"
                if name != "recompute":
                    out, back = got["moved"]
                    assert (got["offloads"] > 0) == leaves, at
                    assert (back > 0) == leaves, at
                    assert back <= out, at
                    assert got["left"] == 0, at


# --- memory -----------------------------------------------------------------------------------

# Wide experts, whose rows are not padded: three of four for every token, both of the first rank's
# and mostly the same one of the second's, so that ranks and experts are chosen unevenly.
WIDE = [
    "model.hidden_size=512",
    "model.moe_intermediate_size=512",
    "model.intermediate_size=512",
    "model.n_routed_experts=4",
    "model.num_experts_per_tok=3",
    "model.num_hidden_layers=9",
    f"data.sequence_length={LENGTH}",
]
CHOICE = [10.0, 10.0, 0.01, 0.0]  # biases of a layer's experts
LOADS = [4 / 3, 2 / 3]  # of the ranks' experts, over those of balanced routing
WHOLE: dict[str, Policy] = {"none": {}, **POLICIES, "k2": PRESETS["k2"]}
MORE = [("gpipe", 1), ("zb_h1", 1), ("dualpipe_v", 2)]
TOGETHER = "together"


@contextmanager
def looking_inside(executor: Executor) -> Iterator[None]:
    """Weigh whenever a backward has put a product off, computed something again or widened it."""
    read, results, load = Ref.load, Chain.results, Fp8Tile.load
    put_off = 0

    def loaded(ref: Ref) -> Tensor:
        nonlocal put_off
        tensor, before = read(ref), put_off
        put_off = len(executor.deferral.into or ())
        if put_off != before:
            executor.weigh_now()
        return tensor

    def computed(chain: Chain) -> list[Tensor]:
        inputs = chain._inputs  # still there when it ends
        made = results(chain)
        if inputs:
            executor.weigh_now()
        return made

    def widened(tile: Fp8Tile) -> Tensor:
        parts, there = tile.parts, tile.loaded is not None
        whole = load(tile)
        if not there:
            tile.parts = parts  # so are the codes
            executor.weigh_now()
            tile.parts = []
        return whole

    with (
        patch.object(Ref, "load", loaded),
        patch.object(Chain, "results", computed),
        patch.object(Fp8Tile, "load", widened),
    ):
        yield


def most_of(step: TrainStep, world: World) -> dict[str, int]:
    """The most that lay on the device during a step: of each tag, and together."""
    most: Counter[str] = Counter()

    def weigh(sizes: Mapping[str, int]) -> None:
        for tag, size in {**sizes, TOGETHER: sum(sizes.values())}.items():
            most[tag] = max(most[tag], size)

    step.executor.weigh = weigh
    with looking_inside(step.executor):
        step.run(1, part_of(world), RATE)
    return dict(most)


def most_planned(config: Config, schedule: Schedule, world: World) -> dict[str, float]:
    setting = replace(Setting.of(config, micro_batch_size(config)), load=LOADS[world.ep.index])

    def most(only: str | None = None) -> float:
        kept = [stage_kept(setting, layers, only) for layers in stages_of(config)]
        moments = held_along(schedule, world.pp.index, kept)
        return max(held.device + held.gradients for held in moments)

    tags = {tag: most(tag) for tag in (*TAGS, WAITING, GRADIENTS)}
    return {TOGETHER: most()} | {tag: size for tag, size in tags.items() if size}


def weigh_each(
    rank: int, world_size: int, schedule: str, vpp: int, ahead: bool
) -> dict[str, tuple[dict[str, int], dict[str, float]]]:
    """What was held at most, and what the plan says, by policy."""
    world, results = None, {}
    for name, tags in WHOLE.items():
        config = configured(schedule, vpp, tags, "precision=bf16", *WIDE)
        world = world or open_world(config.parallel)
        step = open_step(config, torch.bfloat16, world)
        for _, bias in step.model.hf_named_buffers():
            bias.copy_(torch.tensor(CHOICE))
        if ahead and "recompute" in tags.values():
            step.executor.schedule = insert_recompute(step.executor.schedule)
        real = most_of(step, world)
        results[name] = real, most_planned(config, step.executor.schedule, world)
    return results


@pytest.mark.parametrize(
    ("schedule", "vpp", "ahead"),
    [
        *((name, vpp, False) for name, vpp in [*SCHEDULES, *MORE]),
        ("1f1b", 1, True),
        ("k2", 2, True),
    ],
)
def test_the_plan_is_what_is_held(schedule: str, vpp: int, ahead: bool) -> None:
    """Catches a tag that the plan forgets or counts twice, what is freed late or never, and what a
    backward computes again or widens."""
    for rank, results in enumerate(run_ranks(4, weigh_each, schedule, vpp, ahead, timeout=240)):
        for name, (real, planned) in results.items():
            at = f"{schedule}, {name}, rank {rank}"
            assert set(real) == set(planned), at
            for tag, size in planned.items():
                assert real[tag] == pytest.approx(size, rel=0.03), f"{at}: {tag}"


def train_with_idle_experts(rank: int, world_size: int) -> list[float]:
    """All tokens of every layer choose experts of one rank, in turn of the other."""
    config = configured(
        "k2", 2, {}, "precision=bf16", "activation=k2", "optimizer.router_bias_rate=0"
    )
    world = open_world(config.parallel)
    step = open_step(config, torch.bfloat16, world)
    for number, (_, bias) in enumerate(step.model.hf_named_buffers()):
        bias.zero_()[4 * (number % 2) :][:4] += 10.0
    losses = [step.run(number, part_of(world), RATE).loss for number in (1, 2)]
    assert step.executor.activations.offloader is not None
    assert step.executor.activations.offloader.slab.spans.used == 0
    return losses


def test_experts_that_nobody_chose_train() -> None:
    """Catches a rank that ends because it has nothing to copy, quantise or multiply."""
    first, *others = run_ranks(4, train_with_idle_experts, timeout=120)
    assert all(losses == first for losses in others)
    assert first[1] < first[0]
