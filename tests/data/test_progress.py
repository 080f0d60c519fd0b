import io
import sys

from kimi_pretrain.data import progress


def test_plain_lines_are_few(monkeypatch):
    """A log file must not get a line for every unit."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    lines = []
    show = progress.plain_lines(lines.append)
    for done in range(101):
        clock[0] += 0.1
        show("tokenize", done, 100)
    show("write", 0, 0)
    assert [line.split(":")[0] for line in lines] == ["tokenize"] * 3 + ["write"]
    assert lines[0] == "tokenize: 0%\n"
    assert lines[-2] == "tokenize: 100%\n"


def test_a_terminal_gets_a_bar_and_a_file_gets_lines(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for stream, expected in ((Terminal(), "━"), (io.StringIO(), "tokenize: 50%")):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.console() as show:
            show("tokenize", 5, 10)
        assert expected in stream.getvalue()
