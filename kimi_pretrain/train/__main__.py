"""``python -m kimi_pretrain.train`` is ``kimi-pretrain train``: what torchrun starts as a rank."""

import sys

from kimi_pretrain.cli import main
from kimi_pretrain.launch.local import report_as_rank

report_as_rank()
sys.exit(main(["train", *sys.argv[1:]]))
