"""The search: its bound is a bound, its ranking a ranking, its reasons true."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache
from itertools import count
from math import inf
from time import monotonic

import pytest

import kimi_pretrain.plan.search as searching
from kimi_pretrain.config import compose
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.plan.bound import most_tokens
from kimi_pretrain.plan.hardware import Hardware
from kimi_pretrain.plan.run_plan import plan_run
from kimi_pretrain.plan.search import Candidate, Found, Ranked, candidates, search
from kimi_pretrain.plan.search_table import search_data, search_lines

K2 = "experiment=k2_1t_h800_2048"
MOONLIGHT = ["experiment=moonlight_16b_h800_16", "schedule.global_batch_size=256"]


@cache
def found() -> Found:
    return search(compose(MOONLIGHT), 16, top=4, seconds=inf)  # a busy machine must not end it


def test_the_ranking_is_by_speed_and_fits() -> None:
    """Catches a layout ranked by its bound, or one that does not fit."""
    speeds = [one.plan.tokens_per_gpu_second for one in found().ranked]
    assert len(speeds) == 4
    assert speeds == sorted(speeds, reverse=True)
    assert all(one.plan.fits for one in found().ranked)
    assert found().proved


def test_ranked_overrides_are_the_plan() -> None:
    """Catches overrides that lead to another plan than the one that was ranked."""
    best = found().ranked[0]
    again = plan_run(compose([*MOONLIGHT, *best.candidate.overrides]))
    assert again.step.seconds == pytest.approx(best.plan.step.seconds)


def test_every_layout_has_an_outcome() -> None:
    """Catches a candidate that is neither ranked nor given a reason."""
    tried = set(candidates(compose(MOONLIGHT), 16))
    outcomes = [replace(one.candidate, weight_grads_held=None) for one in found().ranked]
    outcomes += [one.candidate for one in found().rejected]
    assert len(outcomes) == len(tried)
    assert set(outcomes) == tried
    assert all(one.reason for one in found().rejected)


def test_no_plan_is_faster_than_its_bound() -> None:
    """Catches a search that prunes the best layout."""
    hardware = Hardware.of(compose(MOONLIGHT).cluster)
    cases = [c for c in candidates(compose(MOONLIGHT), 16) if c.pp <= 4 and c.ep in (1, 8)]
    for candidate in cases[::5]:
        config = candidate.of(compose(MOONLIGHT))
        try:
            plan = plan_run(config)
        except ConfigError:  # dualpipe_v without microbatches enough
            continue
        assert plan.tokens_per_gpu_second <= most_tokens(config, hardware) * (1 + 1e-9), candidate


@pytest.mark.parametrize(
    ("pp", "vpp", "ep", "schedule"),
    [
        (16, 1, 16, "k2"),
        (16, 1, 16, "1f1b"),
        (16, 1, 8, "zb_h1"),
        (8, 2, 32, "k2"),
        (16, 2, 16, "dualpipe_v"),
        (16, 2, 16, "interleaved_1f1b"),
    ],
)
def test_no_plan_of_k2_is_faster_than_its_bound(pp: int, vpp: int, ep: int, schedule: str) -> None:
    """Catches a bound that holds without a long pipeline, a head or a dense layer only."""
    config = compose([K2, "schedule.global_batch_size=1024"])
    layout = Candidate(pp, vpp, ep, 512 // pp, schedule, "balanced", 1)
    for candidate in (layout, *layout.lighter):
        changed = candidate.of(config)
        most = most_tokens(changed, Hardware.of(config.cluster))
        assert plan_run(changed).tokens_per_gpu_second <= most * (1 + 1e-9), candidate


def test_what_is_too_large_puts_off_fewer_weight_gradients() -> None:
    """Catches a layout rejected that one key would make fit."""
    layout = Candidate(16, 1, 16, 32, "k2", "even", 1)
    wide = compose([K2, "schedule.global_batch_size=512"])
    whole = max(rank.total for rank in plan_run(layout.of(wide)).memory)
    (lighter,) = layout.lighter
    less = max(rank.total for rank in plan_run(lighter.of(wide)).memory)
    assert less < whole
    wide.cluster.memory_bytes = (less + whole) / 2
    judged = searching._judge(layout, wide, Hardware.of(wide.cluster))
    assert isinstance(judged, Ranked)
    assert judged.candidate == lighter
    assert "parallel.weight_grads_held=0" in lighter.overrides
    wide.parallel.weight_grads_held = 4  # the user's own
    assert not list(next(candidates(wide, 512)).lighter)


def test_time_is_up_from_the_start_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a search whose limit begins after its bounds, or that starts what it cannot end."""
    clock = count()
    monkeypatch.setattr(searching, "monotonic", lambda: next(clock))  # a second a look
    late = search(compose(MOONLIGHT), 16, seconds=100)
    assert not late.proved
    assert sum(one.kind == "not tried" for one in late.rejected) > 20
    assert len(late.rejected) == len(list(candidates(compose(MOONLIGHT), 16)))
    assert "time ran out" in "\n".join(search_lines(late))
    slow = searching._Clock(next(clock) + 10.0)
    slow.took(nodes=100, seconds=50.0)
    assert slow.has_time(2)
    assert not slow.has_time(20)


@pytest.mark.slow
def test_2048_gpus_take_less_than_half_a_minute() -> None:
    """Catches a search that one does not wait for: all of it, with the time for imports."""
    program = ("-m", "kimi_pretrain", "plan", "search", "--gpus", "2048", K2)
    started = monotonic()
    done = subprocess.run([sys.executable, *program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert monotonic() - started < 30


def test_what_does_not_fit_says_so() -> None:
    """Catches a search on too few GPUs that ends without a word."""
    nothing = search(compose(["experiment=k2_1t_h800_256"]), 16, top=2)
    assert nothing.ranked == ()
    assert {one.kind for one in nothing.rejected} <= {"GPU memory", "shape"}
    assert "  none" in list(search_lines(nothing))


@pytest.mark.parametrize(("gpus", "top", "says"), [(0, 1, "--gpus"), (8, 0, "--top")])
def test_no_search_of_nothing(gpus: int, top: int, says: str) -> None:
    """Catches a traceback for zero GPUs."""
    with pytest.raises(ConfigError, match=says):
        search(compose(MOONLIGHT), gpus, top)


def test_table_and_data() -> None:
    """Catches lines over the edge, and what JSON cannot hold."""
    assert max(map(len, search_lines(found()))) <= 100
    rows = [line for line in search_lines(found()) if line.lstrip()[:1].isdecimal()][:4]
    assert len({row[:60] for row in rows}) == 4  # a layout is told from each other
    data = json.loads(json.dumps(search_data(found())))
    assert len(data["ranked"]) == 4
    assert len(data["rejected"]) == len(found().rejected)
