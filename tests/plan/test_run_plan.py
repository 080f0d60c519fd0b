"""A plan as a whole: its parts add up, and each cause has its effect."""

import re
from functools import cache

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.plan.communication import nodes_of_a_token
from kimi_pretrain.plan.flops import HEAD_MIN_TOKENS, HEAD_TILE_ELEMENTS, head_products
from kimi_pretrain.plan.layout_report import layout_report
from kimi_pretrain.plan.memory import (
    COMPONENTS,
    Static,
    rank_memory,
    static_of_layout,
    static_without_padding,
)
from kimi_pretrain.plan.report import plan_data, plan_lines
from kimi_pretrain.plan.run_plan import Plan, plan_run

K2 = "experiment=k2_1t_h800_2048"
# The same stages on fewer replicas: as many microbatches, less to lay out.
SMALL = [K2, "parallel.dp=16", "schedule.global_batch_size=1024"]


@cache
def plan(*overrides: str) -> Plan:
    return plan_run(compose([*SMALL, *overrides]))


def test_memory_adds_up() -> None:
    """Catches a component that is printed and not counted."""
    for rank in plan().memory:
        assert rank.total == sum(getattr(rank, name) for name in COMPONENTS)
        assert min(getattr(rank, name) for name in COMPONENTS) > 0


def test_the_closed_form_is_the_layout_without_padding() -> None:
    """Catches a search that ranks by other memory than the plan then shows."""
    config = compose([K2])
    one = plan()
    stages = [one.run.stages(rank) for rank in range(16)]
    exact = static_of_layout(layout_report(config))
    for low, high in zip(
        static_without_padding(config, one.run.layers, stages), exact, strict=True
    ):
        assert low.parameters <= high.parameters
        assert low.optimizer == pytest.approx(high.optimizer, rel=0.01)


def test_memory_that_is_known_gets_its_padding() -> None:
    """Catches a search whose ranking shows other memory than the plan of its layout."""
    one = plan()
    known = rank_memory(one.config, one.run, [Static(0.0, 0.0, 0.0)] * 16, one.hardware)
    assert plan_run(one.config, known).memory == one.memory


def test_a_step_is_its_parts() -> None:
    """Catches time that is in no row of the table, or in two."""
    one = plan()
    step, timeline = one.step, one.step.timeline
    parts = step.pipeline + step.reduce_scatter + step.optimizer + step.all_gather
    assert step.seconds == parts
    assert timeline.seconds == step.pipeline
    computed = sum(timeline.busy) / 16
    assert computed == pytest.approx((1 - timeline.bubble) * step.pipeline)
    assert one.gpu_hours(1e12) == pytest.approx(1e12 / one.tokens_per_gpu_second / 3600)


@pytest.mark.parametrize(
    "efficiency", ["matmul", "grouped_matmul", "attention", "memory", "nvlink", "rdma"]
)
def test_every_efficiency_matters(efficiency: str) -> None:
    """Catches a rate that nothing is divided by."""
    slow = plan(f"cluster.efficiency.{efficiency}=0.1")
    assert slow.step.seconds > plan().step.seconds


def test_pairs_hide_the_all_to_all() -> None:
    """Catches a schedule that the simulator never saw: 1F1B exposes what K2's hides."""
    exposed = [
        sum(p.step.timeline.exposed_all_to_all) for p in (plan(), plan("parallel.schedule=1f1b"))
    ]
    assert exposed[1] > 3 * exposed[0]


def test_deepep_sends_a_row_once_to_each_node() -> None:
    """Catches rows to the own node that travel by RDMA, and DeepSeek's limit of four nodes."""
    twice = plan("parallel.dispatcher=all_to_all", "parallel.router_weights=after_combine")
    assert plan().all_to_all.rdma < 0.3 * twice.all_to_all.rdma
    deepseek = compose(["model=deepseek_v3"]).model
    assert 3.5 < nodes_of_a_token(deepseek, 8) < 4
    free = compose(["model=deepseek_v3", "model.topk_group=8"]).model
    assert 5 < nodes_of_a_token(free, 8) < 6


def test_virtual_stages_are_planned() -> None:
    """Catches parameters of one of a rank's stages only."""
    both = plan("parallel.vpp=2", "parallel.pp=8", "parallel.dp=32")
    assert [len(both.run.stages(rank)) for rank in range(8)] == [2] * 8
    held = sum(rank.parameters for rank in both.memory)
    assert held == pytest.approx(sum(rank.parameters for rank in plan().memory), rel=1e-3)


def test_the_head_multiplies_as_often_as_the_loss_does() -> None:
    """Catches a loss that computes its logits once in the plan and twice in the run, or in another
    pass."""
    from kimi_pretrain.ops import linear_cross_entropy

    assert linear_cross_entropy.TILE_ELEMENTS == HEAD_TILE_ELEMENTS
    assert linear_cross_entropy._MIN_TOKENS == HEAD_MIN_TOKENS
    assert head_products(compose(["model=k2"]).model, 4096) == (1, 3)
    assert head_products(compose([]).model, 4096) == (3, 0)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["precision=fp64"], "precision: got 'fp64'"),
        (["optimizer=adamw"], r"optimizer\.name"),
        (["activation.policy=half"], r"activation\.policy"),
        (["schedule.global_batch_size=1000"], r"schedule\.global_batch_size"),
        (["parallel.schedule=none"], r"parallel\.schedule"),
        (["parallel.pp=62"], r"62"),
    ],
)
def test_what_cannot_be_planned_is_refused(overrides: list[str], says: str) -> None:
    """Catches a plan of something that will not run."""
    with pytest.raises(ConfigError, match=says):
        plan_run(compose([*SMALL, *overrides]))


def test_the_text_fits_a_terminal() -> None:
    """Catches columns over the edge, and figures of the reference that nobody prints."""
    lines = list(plan_lines(plan(), None, 15.5e12))
    assert max(map(len, lines)) <= 100
    text = "\n".join(lines)
    for words in ("1,026,408,209,408", "205.47 G", "4.85e+16", "114,688 B", "58.72 MB", "MFU"):
        assert words in text


def test_data_is_complete() -> None:
    """Catches a rank that JSON lost."""
    data = plan_data(plan(), None, 1e12)
    assert len(data["memory"]) == data["pp"] == len(data["replicas"]) == 16
    assert data["fits"]
    assert sum(data["step"]["parts"].values()) == pytest.approx(data["step"]["seconds"])
    assert data["flops_per_step"] == data["flops_per_token"] * data["step_tokens"]
    text = "\n".join(plan_lines(plan(), None, 1e12))
    for row in data["sent"]:  # what the text has, programs have too
        assert {"what", "nvlink", "rdma", "overlaps"} == row.keys()
        assert re.search(re.escape(f"  {row['what']} ") + ".*" + re.escape(row["overlaps"]), text)
    for part, seconds in data["step"]["parts"].items():
        assert re.search(re.escape(f"  {part} ") + f" *{seconds:.3f} ", text)
    assert len(data["sent"]) == 5
    assert data["days"] == pytest.approx(data["gpu_hours"] / data["world"] / 24)
