"""``kimi-pretrain train``: Hydra's own command line around the training loop.

Hydra parses, composes, sweeps, prints and completes as in any Hydra application. Added are
the check of every job before the first one starts, one-line errors, and a run directory for
each job of a sweep. ``hydra.utils.instantiate`` is used nowhere: names are looked up in
registries, so a configuration cannot name code to run.
"""

import os
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path

import hydra
from hydra._internal.utils import get_args
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig

from kimi_pretrain.config import exit_codes
from kimi_pretrain.config.composition import (
    PRIMARY,
    VERSION_BASE,
    compose_from,
    compose_node,
    conf_dir,
    group_options,
    register,
    to_config,
)
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config
from kimi_pretrain.config.translate import HYDRA_ERRORS, translate
from kimi_pretrain.config.validate import validate_training
from kimi_pretrain.parallel.errors import PeerError
from kimi_pretrain.train.schedule import training_schedule

SPIN_COUNT = "10000"
_LAUNCHERS = re.compile(r"[+~]*launcher[.=@]|run_dir=")  # overrides that ranks do not get

Launch = Callable[[list[str], Config], int]  # command line of a rank, its run -> exit code


class _EndOfSweep(BaseException):
    """Carries a job's refusal or stop through Hydra, which catches every ``Exception``."""

    def __init__(self, reason: ConfigError | PeerError | int) -> None:
        super().__init__(reason)
        self.reason = reason


def main(argv: list[str], launch: Launch) -> int:
    """Run the command line ``argv`` (without the word ``train``); returns the exit code.

    Args:
        argv: Hydra's flags and overrides.
        launch: starts a job's ranks, each with the command line it is given. Where there is
            only one, here, or where this is itself such a rank, it trains.

    Raises:
        ConfigError: a flag, a key, a value or a combination that cannot run.
        PeerError: this is a rank, and another one failed or did not answer in time.
    """
    arguments = get_args(argv)
    _refuse_flags(arguments)
    folders = [Path(arguments.config_dir)] if arguments.config_dir else []
    if arguments.help or arguments.hydra_help or arguments.cfg or arguments.info:
        compose_node(arguments.overrides, arguments.config_name or PRIMARY, folders)
    elif not arguments.shell_completion:
        check_jobs(arguments, folders)

    codes: list[int] = []
    composing = True

    def job(composed: DictConfig) -> None:
        nonlocal composing
        composing = False
        try:
            config = _job_config(composed)
            if "RANK" in os.environ or _is_one_here(config):
                codes.append(_train(config))
            else:
                codes.append(launch(_rank_arguments(arguments, config), config))
        except (ConfigError, PeerError) as error:
            raise _EndOfSweep(error) from error
        if codes[-1] == exit_codes.SIGNAL or codes[-1] > exit_codes.SIGNALLED:
            raise _EndOfSweep(codes[-1])

    try:
        _hydra_main(job, argv)
    except _EndOfSweep as end:
        if isinstance(end.reason, int):
            return end.reason
        raise end.reason from None
    except HYDRA_ERRORS as error:
        if not composing:
            raise  # a defect of the program, not a mistake in the command line
        groups = group_options(conf_dir(), *folders)
        raise translate(error, arguments.overrides, groups) from error
    return max(codes, default=0)


def check_jobs(arguments: Namespace, folders: list[Path]) -> None:
    """Compose and validate every job, so that the last one cannot fail hours after the first.

    Raises:
        ConfigError: a job's configuration, or two jobs of a sweep with one run directory.
    """
    name = arguments.config_name or PRIMARY
    if not arguments.multirun:
        _check(compose_from(arguments.overrides, name, folders))
        return
    seen: set[str] = set()
    for overrides in sweep_jobs(arguments.overrides):
        config = compose_from(overrides, name, folders)
        _check(config)
        if _names_run_dir(overrides):
            if config.run_dir in seen:
                rule = "each job of a sweep needs a run directory of its own"
                fix = f"hydra.sweep.dir={config.run_dir}"
                raise ConfigError("run_dir", config.run_dir, rule, fix)
            seen.add(config.run_dir)


def _check(config: Config) -> None:
    validate_training(config)
    training_schedule(config)


def sweep_jobs(overrides: list[str]) -> Iterator[list[str]]:
    """The override lists of a sweep, in the basic sweeper's order."""
    choices: list[list[str]] = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HYDRA_ERRORS as error:
            raise translate(error, [text], {}) from error
        if override.is_discrete_sweep():
            key = override.get_key_element()
            choices.append([f"{key}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([text])
    return map(list, product(*choices))


def _refuse_flags(arguments: Namespace) -> None:
    if arguments.experimental_rerun is not None:
        rule = "it loads a pickle, which can run code"
        fix = "the same run_dir again: a run resumes by itself"
        raise ConfigError("--experimental-rerun", arguments.experimental_rerun, rule, fix)
    if arguments.config_path is not None:
        rule = "the shipped configuration stays the base"
        fix = f"--config-dir={arguments.config_path} to add groups and presets of your own"
        raise ConfigError("--config-path", arguments.config_path, rule, fix)
    if arguments.config_dir is not None and not Path(arguments.config_dir).is_dir():
        rule = "there is no such directory"
        raise ConfigError("--config-dir", arguments.config_dir, rule, "a folder of YAML files")


def _is_one_here(config: Config) -> bool:
    return config.launcher.name == "local" and config.parallel.pp * config.parallel.dp == 1


def _names_run_dir(overrides: list[str]) -> bool:
    return any(override.startswith("run_dir=") for override in overrides)


def _job_config(composed: DictConfig) -> Config:
    """A sweep's job trains in its own folder below the sweep's, unless the user named one."""
    job = HydraConfig.get()
    if job.mode == RunMode.MULTIRUN and not _names_run_dir(list(job.overrides.task)):
        composed.run_dir = job.runtime.output_dir
    return to_config(composed)


def _rank_arguments(arguments: Namespace, config: Config) -> list[str]:
    """The command line of each rank of a job: the job's own, its run directory made explicit.

    Who starts the ranks is no business of theirs.
    """
    overrides = HydraConfig.get().overrides
    path = config.run_dir.replace("'", "\\'")
    return [
        *(f"--config-dir={Path(f).absolute()}" for f in [arguments.config_dir] if f),
        *(f"--config-name={name}" for name in [arguments.config_name] if name),
        *(text for text in overrides.hydra if text.startswith("hydra.searchpath=")),
        *(text for text in overrides.task if not _LAUNCHERS.match(text)),
        f"run_dir='{path}'",
    ]


def _train(config: Config) -> int:
    # Read by OpenMP when torch loads it. Threads that spin for milliseconds at the end of each
    # small operation stop one another whenever anything else wants a core.
    os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)
    # When one rank gives up, torch's sockets warn of it on all the others.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from kimi_pretrain.train.loop import train  # torch: only once the configuration is good

    return train(config)


def _hydra_main(job: Callable[[DictConfig], None], argv: list[str]) -> None:
    register()
    application = hydra.main(
        version_base=VERSION_BASE, config_path=str(conf_dir()), config_name=PRIMARY
    )(job)
    with _as_program(argv):
        application()


@contextmanager
def _as_program(argv: list[str]) -> Iterator[None]:
    """Hydra reads sys.argv, and prints and exits on errors unless told to raise them."""
    before, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    sys.argv = ["kimi-pretrain", *argv]
    os.environ["HYDRA_FULL_ERROR"] = "1"
    try:
        yield
    finally:
        sys.argv = before
        del os.environ["HYDRA_FULL_ERROR"]
        if full_error is not None:
            os.environ["HYDRA_FULL_ERROR"] = full_error
