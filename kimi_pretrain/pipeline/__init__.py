"""The pipeline: schedules as data that is generated, checked, simulated, drawn and executed.

The two public functions are named as their modules, so they are bound here, once and for all: an
import on first use would give a function at first and a module afterwards. Neither needs torch.
"""

from kimi_pretrain.pipeline.simulate import simulate
from kimi_pretrain.pipeline.verify import verify

__all__ = ["simulate", "verify"]
