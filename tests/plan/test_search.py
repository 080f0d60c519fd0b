"""The search: its bound is a bound, its ranking a ranking, its reasons true."""

import json
from functools import cache
from math import inf

import pytest

import kimi_pretrain.plan.search as searching
from kimi_pretrain.config import compose
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.plan.bound import most_tokens
from kimi_pretrain.plan.hardware import Hardware
from kimi_pretrain.plan.run_plan import plan_run
from kimi_pretrain.plan.search import Found, candidates, search
from kimi_pretrain.plan.search_table import search_data, search_lines

MOONLIGHT = ["experiment=moonlight_16b_h800_16", "schedule.global_batch_size=256"]


@cache
def found() -> Found:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(searching, "SECONDS", inf)  # a busy machine must not end it
        return search(compose(MOONLIGHT), 16, top=4)


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
    outcomes = [one.candidate for one in found().ranked]
    outcomes += [one.candidate for one in found().rejected]
    assert len(outcomes) == len(tried)
    assert set(outcomes) == tried
    assert all(one.reason for one in found().rejected)


def test_no_plan_is_faster_than_its_bound() -> None:
    """Catches a search that prunes the best layout."""
    hardware = Hardware.of(compose(MOONLIGHT).cluster)
    cases = [c for c in candidates(compose(MOONLIGHT), 16) if c.pp <= 4 and c.ep in (1, 8)]
    for candidate in cases[::3]:
        config = candidate.of(compose(MOONLIGHT))
        try:
            plan = plan_run(config)
        except ConfigError:  # dualpipe_v without microbatches enough
            continue
        assert plan.tokens_per_gpu_second <= most_tokens(config, hardware) * (1 + 1e-9), candidate


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
    data = json.loads(json.dumps(search_data(found())))
    assert len(data["ranked"]) == 4
    assert len(data["rejected"]) == len(found().rejected)
