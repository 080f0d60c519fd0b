import io
from typing import Any

import pytest

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import LoggingConfig
from kimi_pretrain.telemetry.console import Console


def step_row(step: int, **changes: Any) -> dict[str, Any]:
    row = {
        "step": step,
        "loss": 3.21,
        "tokens_per_second": 12345.0,
        "mfu": 0.31,
        "max_logit": 4.25,
        "step_seconds": 2.0,
    }
    return row | changes


def plain(interval: int = 10) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(LoggingConfig(console="plain", console_interval=interval), stream), stream


def test_plain_lines_come_every_interval_at_the_first_and_at_the_last_step() -> None:
    """A log that stays silent until step 100, or never shows the end."""
    console, stream = plain(interval=10)
    console.start(25)
    for step in range(1, 26):
        console.step(step_row(step))
    shown = [line.split("/")[0].split()[-1] for line in stream.getvalue().splitlines()]
    assert shown == ["1", "10", "20", "25"]


def test_a_resumed_run_shows_its_first_step_at_once() -> None:
    console, stream = plain()
    console.start(100, step=33)
    for step in range(34, 41):
        console.step(step_row(step))
    assert [line.split("/")[0] for line in stream.getvalue().splitlines()] == [
        "step  34",
        "step  40",
    ]


def test_a_line_holds_every_figure() -> None:
    console, stream = plain()
    console.start(600)
    console.step(step_row(10))
    assert stream.getvalue() == (
        "step  10/600  loss 3.2100  tokens/s 12.3k  MFU  31%  max logit   4.2  ETA 19:40\n"
    )


def test_what_was_not_measured_is_a_dash_not_a_crash() -> None:
    console, stream = plain()
    console.start(10)
    console.step(step_row(10, mfu=None, max_logit=float("-inf"), loss=float("nan")))
    assert "loss nan" in stream.getvalue()
    assert "MFU    -" in stream.getvalue()
    assert "max logit  -inf" in stream.getvalue()


def test_the_end_shows_held_out_and_bigram_loss_and_a_tame_sample() -> None:
    console, stream = plain()
    console.note("resumed from step-000100")
    console.start(10, facts={"model": "k2_nano", "run directory": "runs/a"})
    console.evaluation({"step": 10, "heldout_loss": 2.5, "bits_per_byte": 1.25})
    summary = {"heldout_loss": 2.5, "bits_per_byte": 1.25, "bigram_loss": 3.5, "tokens": 4_915_200}
    console.finish(summary | {"prompt": "import", "sample": " os\x1b[2J\nx"})
    console.close()
    console.note("report: runs/a/report/index.html")
    assert stream.getvalue().splitlines() == [
        "resumed from step-000100",
        "model          k2_nano",
        "run directory  runs/a",
        "step 10/10  held-out loss 2.5000  bits/byte 1.2500",
        "held-out loss  2.5000 nats/token, 1.2500 bits/byte",
        "bigram model   3.5000 nats/token on the same tokens",
        "trained on     4.92M tokens",
        "sample",
        "  import os\ufffd[2J",
        "  x",
        "report: runs/a/report/index.html",
    ]


def test_a_log_in_ascii_survives_any_sample() -> None:
    """UnicodeEncodeError at the end of a day's run."""
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding="ascii")
    console = Console(LoggingConfig(console="plain"), stream)
    console.start(1)
    console.finish({"heldout_loss": 1.0, "sample": "漢字"})
    assert raw.getvalue().endswith(b"sample\n  ??\n")


def test_off_says_nothing() -> None:
    stream = io.StringIO()
    with Console(LoggingConfig(console="off"), stream) as console:
        console.start(1, facts={"model": "k2_nano"})
        console.step(step_row(1))
        console.evaluation({"step": 1, "heldout_loss": 2.5})
        console.note("note")
        console.finish({"heldout_loss": 2.5, "sample": "text"})
    assert stream.getvalue() == ""


def test_auto_is_plain_where_nobody_can_redraw(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cursor movements in a log file or on a dumb terminal."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, term in ((io.StringIO(), "xterm"), (Terminal(), "dumb")):
        monkeypatch.setenv("TERM", term)
        console = Console(LoggingConfig(console="auto"), stream)
        console.start(1)
        console.step(step_row(1))
        console.close()
        assert "\x1b" not in stream.getvalue()
        assert stream.getvalue().startswith("step 1/1  loss")


def test_an_unknown_console_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"logging\.console: got 'fancy'"):
        Console(LoggingConfig(console="fancy"), io.StringIO())
