"""``python -m kimi_pretrain`` is ``kimi-pretrain``."""

import sys

from kimi_pretrain.cli import main

sys.exit(main())
