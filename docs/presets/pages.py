"""Writes the generated parts of the preset pages beside it, and their pictures.

`make presets` writes each page's plan and its two pictures; `make dry-run-presets` runs whole steps
on ranks 0, 1 and last, writes what was counted, and fails if any of it is not what is planned. A
part stands between `<!-- NAME -->` and `<!-- /NAME -->`; what is around it is written by hand.
Names of presets choose pages: `docs/presets/pages.py --dry-run k2_nano_cpu`.
"""

import contextlib
import io
import re
import sys
from pathlib import Path

from kimi_pretrain.cli import main
from kimi_pretrain.config import compose
from kimi_pretrain.plan.html import beginning, memory_svg, timeline_svg
from kimi_pretrain.plan.run_plan import plan_run

HERE = Path(__file__).parent
NODES = 48  # of a rank, that a picture shows
# Of 1,024 microbatches the last rank, with one layer, is run in a minute, the first in many.
RANKS = {"k2_1t_h800_256": "last"}


def write_plans(pages: list[Path]) -> int:
    """The plan and the pictures of every page."""
    for page in pages:
        plan = plan_run(compose([f"experiment={page.stem}"]))
        code, text = _printed(["plan", f"experiment={page.stem}"])
        if code != 0:
            raise SystemExit(f"{page.stem} does not fit")
        _part(page, "plan", text)
        timeline = plan.step.timeline
        for name, lines in (
            ("memory", memory_svg(plan)),
            ("step", timeline_svg(timeline, *beginning(timeline, NODES))),
        ):
            (HERE / f"{page.stem}-{name}.svg").write_text("\n".join(lines) + "\n")
        print(page.name)
    return 0


def write_dry_runs(pages: list[Path]) -> int:
    """What whole steps counted, on every page; 1 where it is not what is planned."""
    worst = 0
    for page in pages:
        ranks = ["--ranks", RANKS[page.stem]] if page.stem in RANKS else []
        code, text = _printed(["plan", "--dry-run", f"experiment={page.stem}", *ranks])
        _part(page, "dry-run", text)
        print(f"{page.name}: {'as planned' if code == 0 else 'NOT as planned'}", flush=True)
        worst = max(worst, code)
    return worst


def _printed(arguments: list[str]) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        code = main(arguments)
    return code, said.getvalue()


def _part(page: Path, name: str, text: str) -> None:
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    old = page.read_text()
    part = f"{start}\n```\n{text.rstrip()}\n```\n{end}"
    new, count = re.subn(f"{start}.*?{end}", lambda _: part, old, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"{page.name}: it has no part {start} ... {end}")
    page.write_text(new)


if __name__ == "__main__":
    names = [name for name in sys.argv[1:] if not name.startswith("-")]
    chosen = [HERE / f"{name}.md" for name in names] or sorted(HERE.glob("*.md"))
    sys.exit(write_dry_runs(chosen) if "--dry-run" in sys.argv else write_plans(chosen))
