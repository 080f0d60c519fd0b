"""``python -m kimi_pretrain.doctor`` is ``kimi-pretrain doctor``: a rank that torchrun starts."""

import sys

from kimi_pretrain.cli import main
from kimi_pretrain.launch.local import report_as_rank

report_as_rank()
sys.exit(main(["doctor", *sys.argv[1:]]))
