"""What test_local.py starts as a rank, in place of the training: ``python -m ... MODE FOLDER``."""

import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType

from kimi_pretrain.launch.rank import report_as_rank, run_as_rank

rank, mode, folder = os.environ["RANK"], sys.argv[1], Path(sys.argv[2])
report_as_rank()
signals = 0


def _count(number: int, frame: FrameType | None) -> None:
    global signals
    signals += 1


if mode.startswith("end"):
    if rank == "0":
        print(f"{os.environ['WORLD_SIZE']} {os.environ['OMP_NUM_THREADS']} {sys.argv[3:]}")
    sys.exit(int(mode.removeprefix("end")))
if mode == "defect" and rank == "1":
    raise ZeroDivisionError("a defect of rank 1")
if mode == "killed" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
if mode == "stop":
    signal.signal(signal.SIGTERM, _count)
if mode == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
(folder / rank).write_text(str(os.getpid()))
if mode == "starting":
    run_as_rank(lambda: time.sleep(60) or 0)
for _ in range(600):
    time.sleep(0.1)
    if signals:
        time.sleep(0.5)
        (folder / f"signals-{rank}").write_text(str(signals))
        sys.exit(75)
