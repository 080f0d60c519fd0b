"""The pages of docs/presets: one a whole run, each with its plan, its pictures, its dry run."""

from pathlib import Path
from xml.etree import ElementTree

import pytest

PAGES = Path(__file__).parents[2] / "docs" / "presets"
PRESETS = (
    "deepseek_v3_h800_2048",
    "k2_1t_h800_2048",
    "k2_1t_h800_256",
    "k2_mini_h100_8",
    "k2_nano_cpu",
    "moonlight_16b_h800_16",
)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_its_page(name: str) -> None:
    """Catches a preset without a page, or that does not fit its GPUs, an empty part, a picture that
    is missing or no XML."""
    text = (PAGES / f"{name}.md").read_text()
    assert f"experiment={name}" in text
    plan = text.partition("<!-- plan -->")[2].partition("<!-- /plan -->")[0]
    assert "tokens/s/GPU" in plan
    assert "fits: pipeline rank" in plan
    counted = text.partition("<!-- dry-run -->")[2].partition("<!-- /dry-run -->")[0]
    assert "\nrank " in counted
    assert "DIFFERS" not in counted
    for picture in ("memory", "step"):
        assert f"({name}-{picture}.svg)" in text
        ElementTree.parse(PAGES / f"{name}-{picture}.svg")
