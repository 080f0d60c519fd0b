"""How modules come by the kernels of their run."""

from torch import nn

from kimi_pretrain.ops.kernels import REFERENCE, Kernels


class CallsKernels(nn.Module):
    """A module that calls an operation of ``Kernels``: plain torch until it is handed others."""

    kernels: Kernels = REFERENCE


def hand_out(model: nn.Module, kernels: Kernels) -> None:
    """Let the modules of ``model``, and its weights for their gradients, use ``kernels``."""
    for module in model.modules():
        if isinstance(module, CallsKernels):
            module.kernels = kernels
    for parameter in model.parameters():
        parameter.main_grad_adder = kernels.add_product  # type: ignore[attr-defined]
