"""The peer of the training benchmarks: transformers' DeepseekV3ForCausalLM, trained by
torch.optim.Muon (match_rms_adamw) on its matrices and torch.optim.AdamW on the rest.

The peer runs as its users would run it: its own default attention and expert kernels, its
own loss. torch.optim.Muon takes matrices only, so each expert's matrix of transformers'
fused stacks is given to it as a parameter that is a view of the stack; the gradients are
views too, so nothing is copied.
"""

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from kimi_pretrain.checkpoint.hf import to_hf
from kimi_pretrain.model.causal_lm import CausalLM


def load_peer(model: CausalLM, dtype: torch.dtype, experts: str, attention: str) -> nn.Module:
    """transformers' model with the weights of ours, in `dtype`."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as directory:
        to_hf(model, directory)
        path = Path(directory) / "config.json"
        config = json.loads(path.read_text())
        config["model_type"] = "deepseek_v3"  # transformers registers no `kimi_k2`
        path.write_text(json.dumps(config))
        peer: nn.Module = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            attn_implementation=attention,
            experts_implementation=experts,
        )
    return peer.train()


class PeerOptimizer:
    """torch.optim.Muon and torch.optim.AdamW side by side, on every parameter of the peer."""

    def __init__(self, peer: nn.Module, lr: float, weight_decay: float = 0.1) -> None:
        self._stacks: list[tuple[Tensor, list[nn.Parameter]]] = []
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for name, parameter in peer.named_parameters():
            if parameter.ndim == 3:
                parts = [nn.Parameter(view) for view in _matrices(name, parameter.data)]
                self._stacks.append((parameter, parts))
                matrices += parts
            elif parameter.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name:
                matrices.append(parameter)
            else:
                others.append(parameter)
        self._names = {id(p): n for n, p in peer.named_parameters()}
        self.parts = (
            torch.optim.Muon(
                matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
            ),
            torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay),
        )

    def step(self) -> None:
        for stack, parts in self._stacks:
            assert stack.grad is not None
            name = self._names[id(stack)]
            for part, gradient in zip(parts, _matrices(name, stack.grad), strict=True):
                part.grad = gradient
        for optimizer in self.parts:
            optimizer.step()

    def zero_grad(self) -> None:
        for stack, _ in self._stacks:
            stack.grad = None
        for optimizer in self.parts:
            optimizer.zero_grad(set_to_none=True)

    def set_lr(self, lr: float) -> None:
        for optimizer in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = lr


def _matrices(name: str, stack: Tensor) -> Iterator[Tensor]:
    """Each projection of each expert: transformers fuses gate and up as [E, 2 I, H]."""
    for expert in stack.unbind(0):
        if name.endswith("gate_up_proj"):
            yield from expert.chunk(2, dim=0)
        else:
            yield expert
