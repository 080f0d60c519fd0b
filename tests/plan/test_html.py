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
    assert len(re.findall(r'<path d="[^"]+" fill="#0072B2"', picture)) == 2  # forwards
