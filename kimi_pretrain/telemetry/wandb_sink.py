"""Weights & Biases: curves and the resolved configuration, and nothing about the host.

W&B records by default the command line, the environment's packages, git state, source
code, the console and the machine. All of that is switched off here, explicitly and
against any ``WANDB_*`` variable, since a command line or a console may hold a secret.
Offline mode needs no key and no network; ``wandb sync RUN_DIR/wandb/offline-run-*``
uploads later.
"""

import secrets
from pathlib import Path
from typing import Any

from kimi_pretrain.telemetry.scalars import scalars


class WandbSink:
    """Logs rows as scalars; a resumed run continues the same W&B run.

    Steps that a resumed run repeats are dropped by W&B, which is right: they are equal.
    """

    def __init__(self, run_dir: Path, config: dict[str, Any], project: str, mode: str) -> None:
        import wandb

        run_dir.mkdir(parents=True, exist_ok=True)
        settings = wandb.Settings(
            mode=mode,  # type: ignore[arg-type]
            console="off",
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_disable_machine_info=True,
            x_save_requirements=False,
            host="",
            program="",
            silent=True,
        )
        self._run = wandb.init(
            project=project,
            id=run_id(run_dir),
            name=run_dir.resolve().name,
            resume="allow",
            dir=run_dir,
            config=config,
            settings=settings,
        )

    def row(self, kind: str, values: dict[str, Any]) -> None:
        if kind == "summary":
            self._run.summary.update(scalars(kind, values))
        else:
            self._run.log(scalars(kind, values), step=values["step"])

    def close(self) -> None:
        self._run.finish()


def run_id(run_dir: Path) -> str:
    """The W&B identity of a run directory: drawn once, kept in ``wandb/run-id``.

    Kept in the directory and not computed from its path, so that a run that is moved goes
    on as itself, and two machines' ``runs/default`` are two runs.
    """
    path = run_dir / "wandb" / "run-id"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(secrets.token_hex(8), encoding="ascii")
    return path.read_text(encoding="ascii")
