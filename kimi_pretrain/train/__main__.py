"""``python -m kimi_pretrain.train`` is ``kimi-pretrain train``: what torchrun starts as a rank."""

import os
import sys

from kimi_pretrain.cli import main
from kimi_pretrain.launch.rank import report_as_rank, settle

report_as_rank()
code = settle(main(["train", *sys.argv[1:]]))
sys.stdout.flush()
sys.stderr.flush()
# Python is not taken down: threads of process groups that lost a peer cannot be ended (gloo has
# no abort), and abort the process when they want a Python that is going. See World.close.
os._exit(code)
