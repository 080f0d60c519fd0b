"""The examples in README and docs/ are programs, and run."""

import re
from pathlib import Path
from typing import Any

import pytest

from kimi_pretrain.config.composition import conf_dir, group_options

ROOT = Path(__file__).parents[1]


def _program(page: str) -> str:
    """The first block of Python of a page."""
    found = re.search(r"^```python\n(.*?)^```$", (ROOT / page).read_text(), re.M | re.S)
    assert found is not None, page
    return found[1]


@pytest.mark.parametrize(
    "page", ["README.md", "docs/muonclip.md", "docs/configuration.md", "docs/pipeline.md"]
)
def test_examples_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an example that the code has left behind."""
    monkeypatch.chdir(tmp_path)
    exec(compile(_program(page), page, "exec"), {})


def test_the_example_of_muonclip_clips() -> None:
    """Catches an example that a reader copies and whose QK-Clip never hears of a logit."""
    program = _program("docs/muonclip.md")
    assert program.count("tau = 100.0\n") == 1
    names: dict[str, Any] = {}
    exec(program.replace("tau = 100.0\n", "tau = 1e-3\n"), names)
    metrics = names["optimizer"].qk_clip_metrics
    assert metrics["max_logit"] > 1e-3
    assert metrics["share_clipped"] > 0.5
    assert metrics["last_step"] == 3


@pytest.mark.parametrize("group", group_options(conf_dir()))
def test_the_page_on_configuration_lists_every_option(group: str) -> None:
    """Catches a preset that nobody is told of."""
    page = (ROOT / "docs" / "configuration.md").read_text()
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{group}` |")]
    options = group_options(conf_dir())[group]
    assert [option for option in options if f"`{option}`" not in row] == []
