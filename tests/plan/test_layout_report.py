"""The report of a layout against the reference figures of Kimi K2, and against itself."""

import json
from functools import cache

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.optim.exchange import plan_exchange
from kimi_pretrain.plan.layout_report import (
    EXCHANGE_BYTES,
    LayoutReport,
    StageReport,
    exchange_bytes,
    layout_report,
)
from kimi_pretrain.plan.layout_table import WIDTH, layout_data, layout_lines, si
from kimi_pretrain.plan.parameters import count_parameters
from tests.optim.stage_cases import k2_layout

GB = 1e9


@cache
def k2(ranks: int) -> LayoutReport:
    dp = ranks // 16
    return layout_report(
        compose(["model=k2", "parallel.pp=16", "parallel.ep=16", f"parallel.dp={dp}"])
    )


def usual(report: LayoutReport) -> StageReport:
    """K2's stages of four MoE layers."""
    (stage,) = (s for s in report.stages if len(s.stages) == 14)
    return stage


def test_k2s_stages_are_three_kinds() -> None:
    """Catches stages folded that differ, or printed sixteen times."""
    stages = k2(256).stages
    assert [stage.stages for stage in stages] == [(0,), tuple(range(1, 15)), (15,)]
    assert [stage.layers[0] for stage in stages] == [(0, 3), (4, 7), (60, 60)]
    assert stages[1].layers[-1] == (56, 59)


def test_k2s_parameters_and_gradients_on_256_ranks() -> None:
    """Catches bytes of another model: the reference has 31.72, 28.92 and 14.28 GB a GPU."""
    held = [(s.parameter_bytes + s.gradient_bytes) / GB for s in k2(256).stages]
    assert [round(value, 2) for value in held] == [31.72, 28.92, 14.28]
    # Each element once; with the replicas over ep of what is no expert it is 7.21 TB.
    assert round(6 * k2(256).parameters / 1e12, 2) == 6.16


@pytest.mark.parametrize(
    ("ranks", "gigabytes"), [(256, 34.12), (1024, 8.53), (2048, 4.26), (4096, 2.13)]
)
def test_k2s_state_of_a_four_layer_stage(ranks: int, gigabytes: float) -> None:
    """Catches state sharded over the wrong group; 32, 128, 256 and 512 nodes of 8."""
    assert usual(k2(ranks)).state_bytes / GB == pytest.approx(gigabytes, abs=0.01)


def test_k2s_bytes_on_the_wire_at_256_nodes() -> None:
    """Catches a group of the wrong size, or gradients sent as bf16: 25.7 GB a rank."""
    stage = usual(k2(2048))
    both = stage.reduce_scatter_bytes + stage.all_gather_bytes
    assert both / GB == pytest.approx(25.7, abs=0.05)
    assert stage.reduce_scatter_bytes == 2 * stage.all_gather_bytes


def test_k2s_newton_schulz_of_a_whole_step() -> None:
    """Catches replicas that all orthogonalise the same: 4.85e16 FLOPs at any number of ranks."""
    for ranks in (256, 2048):
        assert k2(ranks).newton_schulz_total == pytest.approx(4.85e16, rel=1e-3)


@pytest.mark.parametrize("ranks", [256, 512, 2048])
def test_k2s_layout_keeps_its_promises(ranks: int) -> None:
    """Catches a change of the layout that the report would show and nobody would read."""
    for stage in k2(ranks).stages:
        assert stage.expert_padding == 1.0
        assert stage.dense_padding <= 1.01
    assert usual(k2(ranks)).newton_schulz.imbalance <= 1.1
    if ranks < 2048:
        assert all(stage.newton_schulz.imbalance <= 1.1 for stage in k2(ranks).stages)


def test_k2s_first_stage_is_uneven_and_not_the_slowest() -> None:
    """Catches a bound reported as met: one dense matrix is 1.157 times the mean at 2,048."""
    report = k2(2048)
    first = report.stages[0].newton_schulz
    assert first.most == first.largest_matrix
    assert first.imbalance == pytest.approx(1.157, abs=1e-3)
    assert first.most / report.newton_schulz.most == pytest.approx(0.875, abs=5e-4)


def test_exchange_is_the_designs_formula() -> None:
    """Catches one way counted only: 4 N_dense / dp x (d - 1) / d, and what is lent."""
    layout = k2_layout(1, 1)  # nobody to lend to
    dense = sum(b.elements for b in layout.buckets if b.kind == "flat")
    sent = exchange_bytes(layout)
    # An owner's own part stays; how large it is depends on where shards cut.
    expected = 4 * dense / layout.dp * (layout.dp - 1) / layout.dp
    assert sum(sent) / len(sent) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("edp", [1, 2])
def test_exchange_is_what_the_ranks_will_send(edp: int) -> None:
    """Catches a report that counts other segments than the optimizer sends."""
    layout = k2_layout(1, edp)
    sent = [0] * layout.dp
    for rank in range(layout.dp):
        for bucket in layout.buckets:
            exchange = plan_exchange(bucket, rank, layout.ep)
            for there_and_back in (exchange.send, exchange.receive):
                for peer, segments in enumerate(there_and_back):
                    if peer != rank:
                        sent[rank] += EXCHANGE_BYTES * sum(s.stop - s.start for s in segments)
    assert exchange_bytes(layout) == sent


def test_the_parameters_are_the_models() -> None:
    """Catches experts of one rank taken for all, or the head counted at every stage."""
    for overrides in ([], ["parallel.ep=4", "parallel.dp=8"], ["parallel.pp=3"]):
        config = compose(overrides)
        report = layout_report(config)
        assert report.parameters == count_parameters(config.model).total


def test_the_configuration_reaches_the_layout() -> None:
    """Catches keys of parallel that the plan leaves out."""
    parallel = ["parallel.dp=4", "parallel.ep=2"]
    flat = layout_report(compose([*parallel, "parallel.dense_sharding=flat"])).stages[0]
    whole = layout_report(compose([*parallel, "parallel.dense_sharding=aligned"])).stages[0]
    assert (flat.dense_sharding, whole.dense_sharding) == ("flat", "aligned")
    assert whole.exchange_bytes_mean < flat.exchange_bytes_mean
    small = layout_report(compose([*parallel, "parallel.bucket_elements=10000"])).stages[0]
    assert sum(small.buckets.values()) > sum(flat.buckets.values())


def test_a_model_without_experts_has_a_layout() -> None:
    """Catches a padding of 0 / 0."""
    (stage,) = layout_report(compose(["model.first_k_dense_replace=4"])).stages
    assert (stage.expert_padding, stage.expert_matrices) == (1.0, 0)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["parallel.pp=5"], "parallel.pp: got 5; .*; try parallel.pp=4"),
        (["parallel.pp=4", "parallel.vpp=2"], "got 8"),
        (["optimizer=adamw"], "optimizer.name"),
        (["parallel.ep=2"], "parallel.dp"),
        (["parallel.ep=7", "parallel.dp=7"], "parallel.ep"),
    ],
)
def test_what_cannot_be_planned_is_refused(overrides: list[str], says: str) -> None:
    """Catches a plan of something that will not run."""
    with pytest.raises(ConfigError, match=says):
        layout_report(compose(overrides))


def test_the_text_fits_a_terminal() -> None:
    """Catches columns that run into each other or over the edge."""
    many = layout_report(compose(["model=deepseek_v3", "parallel.pp=61", "parallel.dp=4"]))
    for report in (k2(2048), k2(256), many):
        lines = list(layout_lines(report))
        assert max(map(len, lines)) <= WIDTH
        assert sum(line.startswith("layers ") for line in lines) == -(-len(report.stages) // 4)
    text = "\n".join(layout_lines(k2(2048)))
    assert "k2 on 2,048 ranks = edp 8 x pp 16 x ep 16; dp 128" in text
    assert "1,026,408,209,408 parameters" in text
    assert "stages 1-14" in text


def test_json_holds_every_owner() -> None:
    """Catches a number that JSON cannot hold, and a list cut as the text's is."""
    data = json.loads(json.dumps(layout_data(k2(2048))))
    first, second, last = data["stages"]
    assert [len(stage["owners"]) for stage in (first, second, last)] == [35, 36, 9]
    assert all(0 <= owned["owner"] < data["dp"] for owned in second["owners"])
    assert second["newton_schulz"]["imbalance"] <= 1.1
    assert data["world"] == 2048


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0 "), (999, "999 "), (1000, "1 k"), (28_919_857_152, "28.92 G"), (999_999, "1 M")],
)
def test_decimal_prefixes(value: float, text: str) -> None:
    """Catches 1e+03 k where a prefix ends."""
    assert si(value) == text
