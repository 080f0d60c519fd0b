"""One start at a time in a run directory."""

import subprocess
import sys
from pathlib import Path

import pytest

from kimi_pretrain.checkpoint.run_lock import hold_run_dir, make_run_dir
from kimi_pretrain.config.errors import ConfigError

_HOLDER = """\
import sys, time
from pathlib import Path
from kimi_pretrain.checkpoint.run_lock import hold_run_dir
with hold_run_dir(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_ends_with_its_process(tmp_path: Path) -> None:
    """Catches two runs in one directory, and a directory locked for ever by a kill -9."""
    command = [sys.executable, "-c", _HOLDER, str(tmp_path / "run")]
    holder = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match="another process is training in it"):
        hold_run_dir(tmp_path / "run")
    holder.kill()
    holder.communicate()
    with hold_run_dir(tmp_path / "run"), pytest.raises(ConfigError):
        hold_run_dir(tmp_path / "run")
    hold_run_dir(tmp_path / "run").close()


@pytest.mark.parametrize("make", [make_run_dir, hold_run_dir])
def test_a_directory_that_cannot_be_written_is_the_run_directorys_fault(
    make: object, tmp_path: Path
) -> None:
    """Catches a line about prepared data, and a folder that exists but takes no file."""
    assert callable(make)
    (tmp_path / "file").write_text("")
    for directory in (Path("/proc"), Path("/proc/run"), tmp_path / "file" / "run"):
        with pytest.raises(ConfigError, match=r"run_dir: got .*; it must be writable"):
            make(directory)
