"""NVIDIA apex: a weight gradient added to its fp32 sum inside the matrix product.

``fused_weight_gradient_mlp_cuda`` of NVIDIA's apex (its PyTorch images have it; otherwise from
github.com/NVIDIA/apex). The package of that name on PyPI is something else.
"""

from functools import cache
from importlib import import_module

import torch
from torch import Tensor

from kimi_pretrain.ops import main_grad
from kimi_pretrain.ops.adapters.probe import obstacle

MODULE = "fused_weight_gradient_mlp_cuda"


@cache
def missing() -> str | None:
    """None, or why it cannot be used."""
    return obstacle([MODULE], "it is not installed (NVIDIA's image or source; not PyPI's apex)")


def add_product(main: Tensor, grad: Tensor, x: Tensor) -> None:
    """See ``kimi_pretrain.ops.main_grad.add_product``: bf16 products summed into fp32 unrounded.

    The router's, which are fp32 in a bf16 model too, stay with plain torch.
    """
    if grad.dtype != torch.bfloat16 or x.dtype != torch.bfloat16:
        main_grad.add_product(main, grad, x)
        return
    import_module(MODULE).wgrad_gemm_accum_fp32(x.contiguous(), grad.contiguous(), main)
