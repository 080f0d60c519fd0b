import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from kimi_pretrain.telemetry.wandb_sink import run_id

pytest.importorskip("wandb")

PROGRAM = """
    import sys
    from pathlib import Path
    from kimi_pretrain.config.schema import Config, LoggingConfig
    from kimi_pretrain.telemetry.sinks import open_sinks

    directory, first, last = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    cfg = Config(logging=LoggingConfig(sinks=["wandb"]), seed=1234567)
    with open_sinks(cfg, directory, first - 1) as sinks:
        print("stdout-is-not-recorded")
        for step in range(first, last + 1):
            sinks.row("step", {"step": step, "tokens": step, "loss": 1 / step})
        sinks.row("layers", {"step": last, "max_logits": [[3.0]], "expert_load": []})
        sinks.row("summary", {"tokens": last, "heldout_loss": 2.0, "sample": "text"})
"""
ARGUMENT, VARIABLE, KEY = "argv-hunter2-secret", "env-hunter2-secret", "key-hunter2-secret"


def start(tmp_path: Path, first: int, last: int) -> None:
    """One start of a run in a process whose command line and environment hold secrets."""
    environment = os.environ | {
        "HOME": str(tmp_path / "home"),
        "SOME_TOKEN": VARIABLE,
        "WANDB_API_KEY": KEY,
        # What a user's shell may have set must not bring the captures back.
        "WANDB_MODE": "online",
        "WANDB_CONSOLE": "wrap",
        "WANDB_SAVE_CODE": "true",
        "WANDB_DISABLE_CODE": "false",
    }
    arguments = [str(tmp_path / "run"), str(first), str(last), f"--password={ARGUMENT}"]
    script = tmp_path / "program-of-the-user.py"
    script.write_text(textwrap.dedent(PROGRAM))
    path = os.pathsep.join(filter(None, [str(Path.cwd()), os.environ.get("PYTHONPATH")]))
    subprocess.run(
        [sys.executable, str(script), *arguments],
        check=True,
        env=environment | {"PYTHONPATH": path},
        timeout=60,
    )


def test_an_offline_run_needs_no_key_and_holds_neither_argv_nor_environment(
    tmp_path: Path,
) -> None:
    """A secret on the command line or in the environment that reaches W&B's files."""
    (tmp_path / "home").mkdir()
    start(tmp_path, 1, 3)
    start(tmp_path, 3, 5)
    roots = [tmp_path / "run", tmp_path / "home"]
    content = {
        path: path.read_bytes() for root in roots for path in root.rglob("*") if path.is_file()
    }
    forbidden = [ARGUMENT, VARIABLE, KEY, "hunter2", "stdout-is-not-recorded", "program-of-the"]
    forbidden += [name for name in [socket.gethostname()] if len(name) > 4]
    for path, data in content.items():
        for word in forbidden:
            assert word.encode() not in data, f"{word} is in {path}"

    records = [path for path in content if path.suffix == ".wandb"]
    identity = run_id(tmp_path / "run")
    assert len(records) == 2, "each start leaves one offline run"
    assert {path.name for path in records} == {f"run-{identity}.wandb"}, "a resume continues it"
    for path in records:
        assert b"step/loss" in content[path]
        assert b"layers/max_logit/00" in content[path]
        assert b"1234567" in content[path], "the resolved configuration is recorded"


def test_the_identity_of_a_run_moves_with_its_directory(tmp_path: Path) -> None:
    first = run_id(tmp_path / "a")
    assert run_id(tmp_path / "a") == first
    assert run_id(tmp_path / "b") != first
    (tmp_path / "a").rename(tmp_path / "c")
    assert run_id(tmp_path / "c") == first
