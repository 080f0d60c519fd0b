"""AdamW (arXiv 1711.05101) for what is not a matrix: embeddings, the head, norms."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import adamw as torch_adamw


def adamw_(
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    """Update `weights` and both moments in place, in one pass over memory.

    Args:
        weights: of any shapes, all of one dtype, fp32 or fp64.
        grads: of the weights' shapes and dtype.
        exp_avgs: first moments, likewise.
        exp_avg_sqs: second moments, likewise.
        step: 1-based number of this step, for the bias correction.
        lr: learning rate.
        betas: decay of the first and the second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled; weights shrink by lr x weight_decay.
    """
    if not weights:
        return
    torch_adamw.adamw(
        list(weights),
        list(grads),
        list(exp_avgs),
        list(exp_avg_sqs),
        max_exp_avg_sqs=[],
        # The operator counts up, one counter a tensor.
        state_steps=[torch.tensor(float(step - 1), device=w.device) for w in weights],
        fused=True,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )
