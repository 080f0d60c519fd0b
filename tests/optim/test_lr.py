import itertools
import math
import subprocess
import sys

import pytest

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import ScheduleConfig, StageConfig
from kimi_pretrain.optim.lr import learning_rate, stage_steps, total_steps

PEAK = 2e-4
K2_TOKENS = 67_108_864
T = 10**12


def k2_schedule(max_steps: int | None = None) -> ScheduleConfig:
    return ScheduleConfig(
        max_steps=max_steps,
        stages=[
            StageConfig("warmup", "linear", steps=500, to=1.0),
            StageConfig("stable", "constant", tokens=10 * T, to=1.0),
            StageConfig("decay", "cosine", tokens=55 * T // 10, to=0.1),
            StageConfig("anneal", "linear", tokens=4 * T // 10, to=0.035),
            StageConfig("long", "constant", tokens=6 * T // 100, to=0.035),
        ],
    )


@pytest.mark.parametrize(
    ("tokens", "steps"),
    [(10 * T, 149_012), (55 * T // 10, 81_956), (4 * T // 10, 5_960), (6 * T // 100, 894)],
)
def test_the_reports_token_counts_give_its_step_counts(tokens: int, steps: int) -> None:
    """Catches truncation (149,011) and rounding up (81,957) of tokens to steps."""
    assert stage_steps(StageConfig("s", "constant", tokens=tokens), K2_TOKENS) == steps


def test_k2s_whole_schedule_is_the_sum_of_its_stages() -> None:
    assert total_steps(k2_schedule(), K2_TOKENS) == 500 + 149_012 + 81_956 + 5_960 + 894


def test_k2_passes_through_the_reports_learning_rates() -> None:
    """Catches an off-by-one at a stage's edge and a cosine that stops short of its end."""
    cfg = k2_schedule()
    ends = [500, 500 + 149_012, 500 + 149_012 + 81_956, 500 + 149_012 + 81_956 + 5_960]
    for end, expected in zip(ends, (2e-4, 2e-4, 2e-5, 7e-6), strict=True):
        assert learning_rate(cfg, PEAK, K2_TOKENS, end - 1) == pytest.approx(expected, rel=1e-12)
    middle = learning_rate(cfg, PEAK, K2_TOKENS, ends[1] + 81_956 // 2 - 1)
    assert middle == pytest.approx((2e-4 + 2e-5) / 2, rel=1e-12)


def test_warm_up_reaches_the_peak_with_its_last_step_and_wastes_none() -> None:
    """Catches a first step at learning rate 0, which moves no weight."""
    cfg = k2_schedule()
    rates = [learning_rate(cfg, PEAK, K2_TOKENS, s) for s in range(502)]
    assert rates[0] == pytest.approx(PEAK / 500, rel=1e-12)
    assert all(a < b for a, b in itertools.pairwise(rates[:500]))
    assert rates[498] < PEAK
    assert rates[499] == rates[500] == rates[501] == PEAK


def test_cosine_is_half_a_period_from_the_previous_stages_end() -> None:
    stages = [
        StageConfig("a", "constant", steps=3, to=0.8),
        StageConfig("b", "cosine", steps=10, to=0.2),
    ]
    cfg = ScheduleConfig(stages=stages)
    for i in range(10):
        expected = 0.2 + 0.6 * 0.5 * (1 + math.cos(math.pi * (i + 1) / 10))
        assert learning_rate(cfg, 1.0, 1, 3 + i) == pytest.approx(expected, rel=1e-12)


def test_any_list_of_stages_works_and_the_last_rate_stays_after_the_end() -> None:
    stages = [
        StageConfig("up", "linear", tokens=400, to=1.0),
        StageConfig("down", "linear", steps=2, to=0.5),
        StageConfig("again", "constant", tokens=200, to=0.75),
    ]
    cfg = ScheduleConfig(stages=stages)
    rates = [learning_rate(cfg, 1.0, 100, s) for s in range(total_steps(cfg, 100) + 2)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1.0, 0.75, 0.5, 0.75, 0.75, 0.75, 0.75])


def test_max_steps_cuts_the_run_and_leaves_the_rates_alone() -> None:
    """Catches a schedule that is squeezed into max_steps."""
    cut = k2_schedule(max_steps=1000)
    assert total_steps(cut, K2_TOKENS) == 1000
    assert learning_rate(cut, PEAK, K2_TOKENS, 999) == PEAK
    assert total_steps(k2_schedule(max_steps=10**9), K2_TOKENS) == 237_822 + 500


@pytest.mark.parametrize(
    "stages",
    [
        [],
        [StageConfig("s", "linear")],
        [StageConfig("s", "linear", tokens=1, steps=1)],
        [StageConfig("s", "linear", tokens=49)],
        [StageConfig("s", "linear", steps=0)],
        [StageConfig("s", "exponential", steps=5)],
    ],
)
def test_impossible_stages_are_refused_in_one_line(stages: list[StageConfig]) -> None:
    with pytest.raises(ConfigError) as error:
        learning_rate(ScheduleConfig(stages=stages), PEAK, 100, 0)
    assert "\n" not in str(error.value)


def test_a_run_without_steps_and_a_negative_step_are_refused() -> None:
    with pytest.raises(ConfigError):
        total_steps(k2_schedule(max_steps=0), K2_TOKENS)
    with pytest.raises(ValueError, match="counts from 0"):
        learning_rate(k2_schedule(), PEAK, K2_TOKENS, -1)


def test_the_schedule_needs_no_torch() -> None:
    """Catches an eager import in optim/__init__.py: planning would pay seconds for it."""
    code = "import sys, kimi_pretrain.optim.lr; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
