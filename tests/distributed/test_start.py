"""How ranks start: they find each other, agree, or all say no in time, as real processes."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from kimi_pretrain.checkpoint.run_lock import hold_run_dir
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import ParallelConfig
from kimi_pretrain.parallel.errors import PeerError
from kimi_pretrain.parallel.rendezvous import Place, meet
from kimi_pretrain.parallel.world import open_world
from tests.distributed.ranks import run_ranks

ROOT = Path(__file__).parents[2]


def _meet(rank: int, size: int, absent: tuple[int, ...], timeout: float) -> tuple[str, str, float]:
    before = time.perf_counter()
    if rank in absent:
        return "absent", "", 0.0
    try:
        open_world(ParallelConfig(dp=size, timeout_seconds=timeout)).close()
    except (PeerError, ConfigError) as error:
        return type(error).__name__, str(error), time.perf_counter() - before
    return "met", "", time.perf_counter() - before


def test_rank_0_names_those_who_never_came() -> None:
    """Catches a hang of half an hour, and survivors that each guess something else."""
    results = run_ranks(4, _meet, (1, 3), 2.0)
    assert [kind for kind, _, _ in results] == ["PeerError", "absent", "PeerError", "absent"]
    line = results[0][1]
    assert line.startswith("ranks 1, 3 of 4 did not come within 2 s (parallel.timeout_seconds)")
    assert "127.0.0.1" in line
    assert "\n" not in line
    assert results[2][1] == line
    assert all(1.5 < seconds < 5 for kind, _, seconds in results if kind == "PeerError")


def _meet_twice(rank: int, size: int) -> list[str]:
    met = []
    for ep in (1, 2):
        world = open_world(ParallelConfig(dp=size, ep=ep, timeout_seconds=30))
        met.append(world.everyone.gather_texts(f"{rank} of {world.topology.ep}")[-1])
        world.close()
    return met


def test_the_next_job_of_a_sweep_meets_anew() -> None:
    """Catches a second meeting that reads the first one's reports and verdict."""
    assert run_ranks(2, _meet_twice) == [["1 of 1", "1 of 2"]] * 2


def test_the_others_end_without_rank_0() -> None:
    """Catches ranks that wait for ever for the one that decides."""
    results = run_ranks(3, _meet, (0,), 2.0)
    assert [kind for kind, _, _ in results] == ["absent", "PeerError", "PeerError"]
    assert all(seconds < 5 for _, _, seconds in results)


def _meet_with_version(rank: int, size: int) -> str:
    import kimi_pretrain.parallel.world as module

    if rank == 2:
        module.__version__ = "0.0.9"
    try:
        open_world(ParallelConfig(dp=size, timeout_seconds=30))
    except ConfigError as error:
        return str(error)
    return "met"


def test_another_version_is_named_before_any_group() -> None:
    """Catches two releases in one run, which may not even speak the same way."""
    lines = run_ranks(3, _meet_with_version)
    assert len(set(lines)) == 1
    assert lines[0].startswith("version of kimi_pretrain on rank 2: got '0.0.9'; ")
    assert "ranks 0, 1 have" in lines[0]


def _meet_with_topology(rank: int, size: int) -> str:
    ep = 2 if rank == 1 else 1
    try:
        open_world(ParallelConfig(dp=size, ep=ep, timeout_seconds=30))
    except ConfigError as error:
        return str(error)
    return "met"


def test_another_topology_of_as_many_ranks_is_named() -> None:
    """Catches groups formed in two ways, which hang in their first operation."""
    lines = run_ranks(4, _meet_with_topology)
    assert len(set(lines)) == 1
    assert "topology on rank 1: got 'edp 2 x pp 1 x ep 2'" in lines[0]


def _report_length(rank: int, size: int) -> int:
    store = meet(Place(rank, size, rank), 30.0, {"long": "x" * 100_000})
    return len(store.get(f"report/{rank}"))


def test_a_report_is_short_whatever_it_stands_for() -> None:
    """Catches whole configurations of 4,096 ranks, which rank 0 would read one by one."""
    assert run_ranks(3, _report_length) == [32, 32, 32]


# --- rank 0's own store, as where a launcher only sets the environment ---------------------

_PROGRAM = """\
import sys
from kimi_pretrain.config.schema import ParallelConfig
from kimi_pretrain.parallel.errors import PeerError
from kimi_pretrain.parallel.world import open_world
try:
    world = open_world(ParallelConfig(dp=int(sys.argv[1]), timeout_seconds=float(sys.argv[2])))
except PeerError as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(4)
world.everyone.barrier()
world.close()
"""


def _start(
    rank: int, size: int, port: int, timeout: float, program: str = _PROGRAM
) -> subprocess.Popen[str]:
    variables = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return subprocess.Popen(
        [sys.executable, "-c", program, str(size), str(timeout)],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_ranks_meet_at_rank_0s_own_store() -> None:
    """Catches a start that only torchrun's store can serve, whoever comes first."""
    port = _free_port()
    ranks = [_start(1, 2, port, 60), _start(0, 2, port, 60)]
    for rank in ranks:
        assert rank.communicate(timeout=60) == ("", "")
        assert rank.returncode == 0


def test_rank_0s_own_store_lives_until_all_have_heard() -> None:
    """Catches a verdict that dies with the store before the others have read it."""
    port = _free_port()
    ranks = [_start(rank, 3, port, 4) for rank in (0, 1)]
    lines = [rank.communicate(timeout=60) for rank in ranks]
    assert lines[0] == lines[1]
    assert lines[0][0].startswith("PeerError: rank 2 of 3 did not come within 4 s")
    assert [rank.returncode for rank in ranks] == [4, 4]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_alone_gives_up_in_time(rank: int) -> None:
    """Catches a lone rank that waits longer than told, or shows a traceback."""
    alone = _start(rank, 2, _free_port(), 3)
    out, err = alone.communicate(timeout=40)
    assert (alone.returncode, err) == (4, "")
    assert out.count("\n") == 1
    expected = "PeerError: rank 1 of 2 did not come" if rank == 0 else "PeerError: nobody"
    assert out.startswith(expected)


_MET = """\
import sys, time
from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import ParallelConfig
from kimi_pretrain.parallel.rendezvous import Place, refuse
from kimi_pretrain.parallel.world import open_world
with open_world(ParallelConfig(dp=int(sys.argv[1]), timeout_seconds=60)) as world:
    world.everyone.barrier()
began = time.monotonic()
told = refuse(Place.of_environment(), ConfigError("data", "x", "it is whole", "another"))
print(told, time.monotonic() - began < 1)
"""


def test_who_has_met_does_not_come_again_to_refuse() -> None:
    """Catches a rank whose data turn out damaged at step 1,000, and which then waits a minute at a
    place where nobody comes before it says so."""
    port = _free_port()
    ranks = [_start(rank, 2, port, 60, _MET) for rank in (0, 1)]
    for rank in ranks:
        assert rank.communicate(timeout=60) == ("False True\n", "")


# --- the whole program -----------------------------------------------------------------------


RUNS = TemporaryDirectory()


def _train(rank: int, size: int, port: int, *overrides: str) -> subprocess.Popen[str]:
    """One rank of a training that is refused before it begins."""
    return _ranked(["-m", "kimi_pretrain.train"], rank, size, port, *overrides)


def _ranked(
    program: list[str], rank: int, size: int, port: int, *overrides: str
) -> subprocess.Popen[str]:
    variables = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    command = [sys.executable, *program, "experiment=smoke", f"run_dir={RUNS.name}/run"]
    return subprocess.Popen(
        [*command, f"parallel.dp={size}", "schedule.global_batch_size=24", *overrides],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_mixed_command_lines_are_one_line_from_rank_0() -> None:
    """Catches a run in which one node read another configuration, or N copies of the line."""
    port = _free_port()
    ranks = [_train(0, 2, port), _train(1, 2, port, "optimizer.lr=1")]
    (out, err), (_, other) = [rank.communicate(timeout=90) for rank in ranks]
    assert err.startswith("kimi-pretrain: optimizer.lr on rank 1: got '1.0'; every rank must")
    assert (out, err.count("\n"), other) == ("", 1, "")
    assert [rank.returncode for rank in ranks] == [2, 2]


def test_a_peer_that_never_joins_is_one_line_from_rank_0() -> None:
    """Catches a hang, a traceback or a zero exit where a node never came up."""
    port = _free_port()
    ranks = [_train(rank, 3, port, "parallel.timeout_seconds=6") for rank in (0, 1)]
    (out, err), (_, other) = [rank.communicate(timeout=90) for rank in ranks]
    assert err.startswith("kimi-pretrain: rank 2 of 3 did not come within 6 s")
    assert (out, err.count("\n"), other) == ("", 1, "")
    assert [rank.returncode for rank in ranks] == [4, 4]


def test_a_refusal_of_all_ranks_is_one_line_from_rank_0() -> None:
    """Catches N copies of a line where a launcher only sets the environment and ends nobody: every
    rank finds by itself, before it meets the others, that ep does not divide the experts."""
    port = _free_port()
    ranks = [_train(rank, 2, port, "parallel.ep=5", "parallel.dp=5") for rank in (1, 0)]
    (_, other), (out, err) = [rank.communicate(timeout=90) for rank in ranks]
    assert err.startswith("kimi-pretrain: parallel.ep: got 5; "), err
    assert (out, err.count("\n"), other) == ("", 1, "")
    assert [rank.returncode for rank in ranks] == [2, 2]


def test_a_refusal_of_one_rank_among_good_ones_is_one_line_from_rank_0() -> None:
    """Catches ranks that wait out their ten minutes for one that was refused, and then say only
    that it did not come."""
    port = _free_port()
    ranks = [_train(0, 3, port), _train(2, 3, port, "optimizer.lr=-1"), _train(1, 3, port)]
    (out, err), *others = [rank.communicate(timeout=90) for rank in ranks]
    assert err.startswith("kimi-pretrain: optimizer.lr on rank 2: got -1.0; "), err
    assert (out, err.count("\n"), others) == ("", 1, [("", "")] * 2)
    assert [rank.returncode for rank in ranks] == [2, 2, 2]


def test_a_rank_that_starts_late_hears_of_a_refusal() -> None:
    """Catches a rank 0 that leaves once all who were there have heard: one that was importing still
    then waits ten minutes for a store that is gone."""
    port = _free_port()
    first, refused = _train(0, 3, port), _train(2, 3, port, "optimizer.lr=-1")
    refused.communicate(timeout=90)
    late = _train(1, 3, port)
    (_, err), (_, other) = [rank.communicate(timeout=90) for rank in (first, late)]
    assert err.startswith("kimi-pretrain: optimizer.lr on rank 2: got -1.0; "), err
    assert (other, [rank.returncode for rank in (first, refused, late)]) == ("", [2, 2, 2])


def test_a_refusal_of_rank_0_alone_ends_the_others_too() -> None:
    """Catches good ranks that wait for a rank 0 which was refused."""
    port = _free_port()
    ranks = [_train(0, 2, port, "optimizer.lr=-1"), _train(1, 2, port)]
    (out, err), (_, other) = [rank.communicate(timeout=90) for rank in ranks]
    assert err.startswith("kimi-pretrain: optimizer.lr: got -1.0; "), err
    assert (out, err.count("\n"), other) == ("", 1, "")
    assert [rank.returncode for rank in ranks] == [2, 2]


def test_a_refusal_of_one_rank_alone_is_heard() -> None:
    """Catches the silence when only one node's own command line is wrong, and no rank 0 comes."""
    program = (
        "import sys; import kimi_pretrain.parallel.rendezvous as module;"
        "from kimi_pretrain.cli import main; module.REFUSAL_SECONDS = 2.0;"
        "sys.exit(main(['train', *sys.argv[1:]]))"
    )
    rank = _ranked(["-c", program], 1, 2, _free_port(), "optimizer.lr=-1")
    _, err = rank.communicate(timeout=90)
    assert err.startswith("kimi-pretrain: rank 1: optimizer.lr: got -1.0; ")
    assert (rank.returncode, err.count("\n")) == (2, 1)


def test_a_run_directory_in_use_is_one_line_from_rank_0(tmp_path: Path) -> None:
    """Catches two runs in one directory under a launcher of one's own, and ranks that form groups
    only to hear of it."""
    port, run_dir = _free_port(), f"run_dir={tmp_path}"
    with hold_run_dir(tmp_path):
        ranks = [_train(rank, 2, port, run_dir) for rank in (1, 0)]
        (_, other), (out, err) = [rank.communicate(timeout=90) for rank in ranks]
    assert err.startswith(f"kimi-pretrain: run_dir: got '{tmp_path}'; another process is"), err
    assert (out, err.count("\n"), other) == ("", 1, "")
    assert [rank.returncode for rank in ranks] == [2, 2]


def test_a_store_port_in_use_is_one_line() -> None:
    """Catches a traceback where MASTER_PORT is another program's."""
    with socket.create_server(("", 0)) as stranger:
        rank = _train(0, 2, stranger.getsockname()[1], "parallel.timeout_seconds=3")
        out, err = rank.communicate(timeout=90)
    assert err.startswith("kimi-pretrain: MASTER_PORT: got "), err
    assert (out, err.count("\n"), rank.returncode) == ("", 1, 2)


def test_torchrun_with_too_many_ranks_is_refused(tmp_path: Path) -> None:
    """Catches ranks without a place under a launcher of one's own, told four times."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    program = ["--nproc-per-node=3", "-m", "kimi_pretrain.train", "experiment=smoke"]
    done = subprocess.run(
        [*torchrun, *program, "parallel.ep=2", "parallel.dp=2", f"run_dir={tmp_path / 'run'}"],
        cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},  # torchrun leaves an empty folder there
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if line.startswith("kimi-pretrain: ")]
    assert len(lines) == 1, done.stderr
    assert lines[0].endswith("a multiple of parallel.pp x parallel.ep = 1 x 2 = 2; try 4 ranks")
    assert done.returncode != 0
    assert not (tmp_path / "run").exists()
