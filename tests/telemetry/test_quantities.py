import math

import pytest

from kimi_pretrain.telemetry.quantities import count, decimal, duration, percent, printable, tick


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (950, "950"),
        (999.4, "999"),
        (999.6, "1.00k"),
        (12_345, "12.3k"),
        (99_960, "100k"),
        (999_600, "1.00M"),
        (4_915_200, "4.92M"),
        (1_026_408_209_408, "1.03T"),
        (math.nan, "nan"),
    ],
)
def test_counts_keep_three_digits_across_prefixes(number: float, text: str) -> None:
    """1000k instead of 1.00M: a column that changes its width."""
    assert count(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (8000, "8k"), (1500, "1.5k"), (0.25, "0.25"), (0.0015, "1.5e-3"), (2e-4, "2e-4")],
)
def test_ticks_are_as_short_as_they_get(number: float, text: str) -> None:
    assert tick(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0:00"),
        (59.6, "1:00"),
        (754, "12:34"),
        (3599.7, "1:00:00"),
        (3723, "1:02:03"),
        (86400 * 3 + 4 * 3600 + 300, "3d 04:05"),
        (math.inf, "-"),
    ],
)
def test_durations_carry_over_when_rounded(seconds: float, text: str) -> None:
    """0:60 instead of 1:00."""
    assert duration(seconds) == text


def test_percent_and_decimal_have_a_word_for_nothing() -> None:
    assert (percent(0.305), percent(0.0312), percent(None)) == ("30%", "3.1%", "-")
    assert (decimal(1.23456, 4), decimal(None, 4)) == ("1.2346", "-")
    assert (decimal(math.nan, 2), decimal(-math.inf, 2)) == ("nan", "-inf")


def test_a_sample_cannot_drive_the_terminal_or_the_page() -> None:
    """An escape sequence, a bell, a lone surrogate or a bidi override that a model wrote."""
    text = "a\x1b[2Jb\x07c\ud800d\u202ee\x85f"
    assert printable(text) == "a\ufffd[2Jb\ufffdc\ufffdd\ufffde\ufffdf"


def test_every_script_passes_unchanged() -> None:
    text = "line\n\ttab, 漢字, עברית, हिन्दी, 👩‍🚀, é"
    assert printable(text) == text
