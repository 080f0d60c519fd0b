"""Main gradients: one flat buffer in which every microbatch accumulates at full precision.

Weight gradients of a bf16 model are rounded once, when a microbatch's backward produces
them, and never again: they are added into an fp32 buffer (fp64 for an fp64 model), which
is what the norm, the guards and the optimizer read.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from kimi_pretrain.ops.precision import accumulate_dtype


class MainGradients:
    """Gives every parameter a `main_grad` view into one flat buffer of fp32 (or fp64).

    A parameter of the buffer's own dtype accumulates into it directly, `.grad` being that
    view; the gradient of a narrower one is added to its view as soon as autograd has it
    and freed, so that at most one parameter's narrow gradient is alive at a time.
    """

    def __init__(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        self.parameters = [(n, p) for n, p in named_parameters if p.requires_grad]
        first = self.parameters[0][1]
        dtype = accumulate_dtype(first.dtype)
        size = sum(p.numel() for _, p in self.parameters)
        self.flat = torch.zeros(size, dtype=dtype, device=first.device)
        offset = 0
        for _, parameter in self.parameters:
            view = self.flat[offset : offset + parameter.numel()].view_as(parameter)
            offset += parameter.numel()
            parameter.main_grad = view  # type: ignore[attr-defined]
            if parameter.dtype == dtype:
                parameter.grad = view
            else:
                parameter.register_post_accumulate_grad_hook(_add_to_main_grad)  # type: ignore[no-untyped-call]

    def zero(self) -> None:
        """Start the next step."""
        self.flat.zero_()

    def norm(self) -> Tensor:
        """Global L2 norm over all parameters, float64 scalar."""
        norm: Tensor = torch.linalg.vector_norm(self.flat, dtype=torch.float64)
        return norm

    def clip(self, norm: Tensor, limit: float | None) -> None:
        """Scale all gradients so that a global `norm` above `limit` becomes `limit`."""
        if limit is not None and float(norm) > limit:
            self.flat.mul_(limit / float(norm))

    def nonfinite(self) -> list[str]:
        """Names of the parameters whose gradient holds a NaN or an infinity."""
        return [
            name
            for name, parameter in self.parameters
            if not bool(torch.isfinite(parameter.main_grad).all())  # type: ignore[attr-defined]
        ]


def _add_to_main_grad(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.main_grad.add_(parameter.grad)  # type: ignore[attr-defined]
    parameter.grad = None
