"""The house: a room imports only from rooms on floors below its own (docs/architecture.md)."""

import ast
from pathlib import Path

import pytest

import kimi_pretrain

PACKAGE = Path(kimi_pretrain.__file__).parent
FLOORS = [
    {"config"},
    {"ops"},
    {"activation", "parallel"},
    {"model"},
    {"pipeline", "optim", "data"},
    {"plan", "telemetry", "checkpoint"},
    {"train", "launch", "doctor"},
    {"dry_run"},
    {"cli"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
TORCH_FREE = ("config", "data", "plan", "telemetry", "cli")


def _imports(path: Path) -> set[str]:
    """Dotted modules that a file imports anywhere, function bodies included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module)
    return found


def _files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if not path.name.startswith("__"))


def _room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", _files(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_import_climbs(path: Path) -> None:
    """Catches a model that knows its training loop, or a configuration that needs torch."""
    room = _room(path)
    for module in _imports(path):
        parts = module.split(".")
        if parts[0] == "kimi_pretrain" and len(parts) > 1 and parts[1] != room:
            assert FLOOR[parts[1]] < FLOOR[room], f"{room} imports {module}"
        if room in TORCH_FREE:
            assert parts[0] != "torch", f"{room} imports {module}"
