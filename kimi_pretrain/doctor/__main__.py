"""``python -m kimi_pretrain.doctor`` is ``kimi-pretrain doctor``: a rank that torchrun starts."""

import sys

from kimi_pretrain.cli import main
from kimi_pretrain.launch.rank import run_as_rank

run_as_rank(lambda: main(["doctor", *sys.argv[1:]]))
