"""``python -m kimi_pretrain.train`` is ``kimi-pretrain train``: what torchrun starts as a rank."""

import sys

from kimi_pretrain.cli import main
from kimi_pretrain.launch.rank import run_as_rank

run_as_rank(lambda: main(["train", *sys.argv[1:]]))
