"""The page of a plan."""

import re
from xml.etree import ElementTree

from kimi_pretrain.config import compose
from kimi_pretrain.plan.html import memory_svg, plan_page, timeline_svg
from kimi_pretrain.plan.run_plan import plan_run

OVERRIDES = [
    "model.name='<k2> & co'",
    "cluster=h800",
    "parallel.pp=2",
    "parallel.vpp=2",
    "parallel.schedule=k2",
]


def test_the_page_loads_nothing_and_is_well_formed() -> None:
    """Catches a picture that needs the network, and names that end the markup."""
    plan = plan_run(compose(OVERRIDES))
    page = plan_page(plan, None, 1e9)
    assert "<k2>" not in page
    assert not re.search(r"(src|href)=|<script|@import", page)
    assert page.count("<svg") == page.count("</svg>") == 3
    for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        ElementTree.fromstring(picture)


def test_bars_are_the_memory() -> None:
    """Catches a component that has no bar, or a rank without one."""
    plan = plan_run(compose(OVERRIDES))
    picture = "\n".join(memory_svg(plan))
    assert picture.count("<title>rank ") == 2 * 8
    assert "80 GB" in picture


def test_the_timeline_shows_every_rank() -> None:
    """Catches an empty lane, and a window that leaves out the step."""
    plan = plan_run(compose(OVERRIDES))
    timeline = plan.step.timeline
    picture = "\n".join(timeline_svg(timeline, 0.0, timeline.seconds))
    ElementTree.fromstring(picture)
    for rank in range(2):
        assert f">rank {rank}<" in picture
    for label in ("forward", "overlapped pair", "weight gradients", "idle"):
        assert f">{label}<" in picture
    assert "all-to-all exposed" not in picture  # one rank has all experts
    assert len(re.findall(r'<path d="[^"]+" fill="#0072B2"', picture)) == 2  # forwards


def test_short_steps_have_ticks_that_differ() -> None:
    """Catches five times 0.00 s below a step of milliseconds."""
    timeline = plan_run(compose(OVERRIDES)).step.timeline
    picture = "\n".join(timeline_svg(timeline, 0.0, 3e-3))
    ticks = re.findall(r">([0-9.]+) s<", picture)
    assert ticks == ["0.00000", "0.00075", "0.00150", "0.00225", "0.00300"]
