import io
import re
from collections.abc import Mapping

import pytest
from rich.console import Console as RichConsole

from kimi_pretrain.config.schema import LoggingConfig
from kimi_pretrain.telemetry.console import Console
from kimi_pretrain.telemetry.live import StatusLine

FIGURES = {
    "step": "120/600",
    "loss": "3.2140",
    "tokens/s": "12.4k",
    "MFU": " 31%",
    "max logit": "  4.1",
    "ETA": "1:02",
}
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


class Terminal(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return Terminal()


def drawn(width: int, figures: Mapping[str, str] = FIGURES) -> list[str]:
    stream = io.StringIO()
    RichConsole(file=stream, width=width).print(StatusLine(120, 600, figures))
    return [line.rstrip() for line in stream.getvalue().splitlines()]


@pytest.mark.parametrize("width", [30, 40, 50, 60, 70, 80, 100, 200])
def test_the_line_is_one_row_at_any_width(width: int) -> None:
    """A wrapped line, which a terminal cannot redraw and repeats at every step."""
    (line,) = drawn(width)
    assert len(line) <= width
    assert line.startswith("120/600  ━")


def test_a_wide_terminal_shows_everything_and_a_narrow_one_what_matters() -> None:
    assert re.fullmatch(
        r"120/600  [━╸╺ ]{40}  loss 3\.2140  tokens/s 12\.4k  MFU  31%  max logit   4\.1  ETA 1:02",
        drawn(120)[0],
    )
    assert re.fullmatch(r"120/600  [━╸╺ ]+  loss 3\.2140  ETA 1:02", drawn(48)[0])


def test_one_line_is_redrawn_and_evaluations_stand_above_it(terminal: Terminal) -> None:
    """Progress that scrolls the terminal: one row must be left of any number of steps."""
    row = {"loss": 3.21, "tokens_per_second": 1e4, "mfu": 0.3, "max_logit": 4.0, "step_seconds": 1}
    with Console(LoggingConfig(console="auto"), terminal) as console:
        console.start(50)
        for step in range(1, 51):
            console.step(row | {"step": step})
            if step == 20:
                console.evaluation({"step": 20, "heldout_loss": 2.5, "bits_per_byte": 1.25})
    output = terminal.getvalue()
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in output.split("\n")]
    assert sum("held-out loss 2.5000" in line for line in lines) == 1
    # What is left on screen are the rows that a newline, not a redrawing, ended.
    final = [line.split("\r")[-1].rstrip() for line in lines if line.strip("\r ")]
    assert len(final) == 2, final
    assert final[0] == "step 20/50  held-out loss 2.5000  bits/byte 1.2500"
    assert final[1].startswith("50/50")


def test_the_cursor_comes_back_whatever_happens(terminal: Terminal) -> None:
    console = Console(LoggingConfig(console="live"), terminal)

    def interrupted() -> None:
        with console:
            console.start(10)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    console.close()
    output = terminal.getvalue()
    assert output.count(HIDE) == output.count(SHOW) == 1
    assert output.rindex(SHOW) > output.rindex(HIDE)


def test_markup_in_texts_is_shown_not_obeyed(terminal: Terminal) -> None:
    """A path or a sample with brackets that vanishes or raises MarkupError."""
    with Console(LoggingConfig(console="live"), terminal) as console:
        console.note("wrote runs/[bold]/a[/]")
        console.start(1, facts={"data": "[red]"})
        console.finish({"heldout_loss": 1.0, "prompt": "a[/b]", "sample": "x[0] = [/i]\x1b[2J"})
    output = terminal.getvalue()
    for text in ("wrote runs/[bold]/a[/]", "[red]", "a[/b]", "x[0] = [/i]\ufffd[2J"):
        assert text in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output)
    assert "\x1b[2J" not in output
