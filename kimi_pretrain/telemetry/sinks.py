"""Where a run's rows go: the files of ``jsonl`` always, other services by name."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config
from kimi_pretrain.telemetry.jsonl import JsonlSink, truncate_after


class Sink(Protocol):
    """Takes the rows of a run.

    ``kind`` is ``step`` (one an optimizer step), ``eval``, ``layers`` (per-layer arrays),
    ``ranks`` (ranks compared) or ``summary`` (once, at the end). Rows but the summary carry
    ``step``.
    """

    def row(self, kind: str, values: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Sinks:
    """Several sinks as one; leaving the ``with`` block closes them all, whatever happened."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)

    def row(self, kind: str, values: dict[str, Any]) -> None:
        for sink in self._sinks:
            sink.row(kind, values)

    def close(self) -> None:
        with ExitStack() as closing:
            for sink in reversed(self._sinks):
                closing.callback(sink.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _jsonl(cfg: Config, run_dir: Path) -> Sink:
    return JsonlSink(run_dir)


def _wandb(cfg: Config, run_dir: Path) -> Sink:
    from kimi_pretrain.telemetry.wandb_sink import WandbSink

    return WandbSink(
        run_dir, asdict(cfg), project=cfg.logging.wandb_project, mode=cfg.logging.wandb_mode
    )


def _tensorboard(cfg: Config, run_dir: Path) -> Sink:
    from kimi_pretrain.telemetry.tensorboard_sink import TensorboardSink

    return TensorboardSink(run_dir)


def _prometheus(cfg: Config, run_dir: Path) -> Sink:
    from kimi_pretrain.telemetry.prometheus_sink import PrometheusSink

    return PrometheusSink(run_dir, cfg.logging.prometheus_file)


SINKS: Mapping[str, Callable[[Config, Path], Sink]] = {
    "jsonl": _jsonl,
    "wandb": _wandb,
    "tensorboard": _tensorboard,
    "prometheus": _prometheus,
}
# The package a sink needs beside the core ones; its extra has the same name.
_PACKAGES = {"wandb": "wandb", "tensorboard": "tensorboard"}


def check_sinks(cfg: Config) -> None:
    """Refuses a sink that cannot work, in milliseconds and without importing it.

    Raises:
        ConfigError: ``logging.sinks`` names no sink of ours, or one whose package is absent.
    """
    for name in cfg.logging.sinks:
        if name not in SINKS:
            close = difflib.get_close_matches(name, SINKS, n=1) or ["[]"]
            raise ConfigError(
                what="logging.sinks",
                value=name,
                rule=f"a sink is one of {', '.join(SINKS)}",
                fix=f"logging.sinks=[{close[0].strip('[]')}]",
            )
        package = _PACKAGES.get(name)
        if package is not None and find_spec(package) is None:
            raise ConfigError(
                what="logging.sinks",
                value=name,
                rule=f"this sink needs the package {package}, which is not installed",
                fix=f"pip install 'kimi_pretrain[{name}]'",
            )


def open_sinks(cfg: Config, run_dir: Path, finished_steps: int | None = None) -> Sinks:
    """The sinks of a run; ``jsonl`` comes first and needs no naming.

    A resumed run passes the steps its checkpoint has finished (0 for a start from
    nothing): later rows of an earlier start are cut off by ``jsonl.truncate_after``, so
    that each step is recorded once. None appends to whatever is there.

    Raises:
        ConfigError: as ``check_sinks``.
    """
    check_sinks(cfg)
    if finished_steps is not None:
        truncate_after(run_dir, finished_steps)
    names = dict.fromkeys(["jsonl", *cfg.logging.sinks])
    with ExitStack() as opened:
        sinks: list[Sink] = []
        for name in names:
            sinks.append(SINKS[name](cfg, run_dir))
            opened.callback(sinks[-1].close)
        opened.pop_all()
    return Sinks(sinks)
