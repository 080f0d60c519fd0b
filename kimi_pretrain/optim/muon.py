"""MuonClip, the optimizer of Kimi K2 (arXiv 2507.20534, Algorithm 1), as a torch optimizer.

Matrices are updated by Muon, everything else by AdamW at the same root mean square; after
the update QK-Clip scales the query and key rows of heads whose logits grew beyond tau.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import StateDict

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.ops.precision import accumulate_dtype
from kimi_pretrain.optim.adamw import adamw_
from kimi_pretrain.optim.groups import (
    Group,
    require_named,
    require_same_names,
    require_sound,
    uses_muon,
)
from kimi_pretrain.optim.muon_update import MuonSettings, Stack, muon_
from kimi_pretrain.optim.orthogonalize import coefficient_table
from kimi_pretrain.optim.qk_clip import (
    Clip,
    HeadDims,
    Observation,
    attention_layers,
    require_fitting,
)

# torch's wrapper of this method keeps dynamo from tracing it, and imports dynamo to say so:
# 1.6 s at the start of every run. What it wraps does the work.
_add_param_group = inspect.unwrap(Optimizer.add_param_group)


class MuonClip(Optimizer):
    """Muon with QK-Clip for matrices, AdamW for embeddings, head, norms and biases.

    A drop-in ``torch.optim.Optimizer``: parameter groups (each with its own settings),
    closures, learning-rate schedulers, ``state_dict``. Everything it knows lies in
    ``param_groups`` and ``state``.

    Parameters of two or more dimensions are stacks [..., rows, cols] of matrices, each one
    orthogonalised by itself; equal shapes of the whole group go through one batched
    Newton-Schulz. A group with ``use_muon`` True or False overrides ``uses_muon``.

    Weights narrower than fp32 are updated in fp32 masters kept in the state and rounded
    from them, so they must not be changed elsewhere after the first step. A gradient is
    read from ``parameter.main_grad`` where that is set, else from ``parameter.grad``, and
    widened to the master's dtype. An fp64 parameter is fp64 throughout.

    Args:
        named_parameters: (name, parameter) pairs, as ``module.named_parameters()`` gives
            them, or groups whose ``params`` are such pairs.
        lr: learning rate of both Muon and AdamW.
        weight_decay: decoupled, of every parameter, norms too: W <- (1 - lr wd) W.
        momentum: mu of Muon, in [0, 1).
        nesterov: look one step ahead.
        qk_clip_threshold: tau of QK-Clip; None switches it off.
        qk_head_dims: rows of a head (nope, rope, v); needed for QK-Clip.
        betas: of AdamW.
        eps: of AdamW.
        update_rms: root mean square of Muon's update is this x lr (arXiv 2502.16982: 0.2).
        ns_coefficients: a table of ``orthogonalize.COEFFICIENTS``, or (a, b, c) a step.
        ns_dtype: of the Newton-Schulz products; None is bf16, and fp64 for fp64 parameters.

    Raises:
        ConfigError: unnamed parameters, one name twice, or a setting out of its range.
    """

    def __init__(
        self,
        named_parameters: Iterable[Any],
        lr: float | Tensor = 2e-4,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        qk_clip_threshold: float | None = 100.0,
        *,
        qk_head_dims: tuple[int, int, int] | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        update_rms: float = 0.2,
        ns_coefficients: str | Sequence[Sequence[float]] = "keller5",
        ns_dtype: torch.dtype | None = None,
    ) -> None:
        if qk_clip_threshold is not None and not qk_clip_threshold > 0:
            raise ConfigError("qk_clip_threshold", qk_clip_threshold, "tau is above 0", "100.0")
        self.qk_clip_threshold = qk_clip_threshold
        self.qk_head_dims = None if qk_head_dims is None else HeadDims(*qk_head_dims)
        self._observed: Observation | None = None
        self._clip = Clip.of_nothing()
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "betas": betas,
            "eps": eps,
            "update_rms": update_rms,
            "ns_coefficients": ns_coefficients,
            "ns_dtype": ns_dtype,
            "use_muon": None,
            "steps": 0,
            "last_clipped_step": None,
        }
        super().__init__(named_parameters, defaults)

    def add_param_group(self, param_group: Group) -> None:
        """Add parameters with settings of their own; a late group counts its own steps.

        Raises ConfigError as the constructor does.
        """
        group = {**param_group, "params": require_named(param_group["params"], self.names.values())}
        require_sound(self.defaults | group)
        _add_param_group(self, group)

    @property
    def names(self) -> dict[Tensor, str]:
        """The name of every parameter, in order."""
        return {p: name for group in self.param_groups for name, p in _named(group)}

    @property
    def steps(self) -> int:
        """Steps done; AdamW's bias correction counts them."""
        return max(int(group["steps"]) for group in self.param_groups)

    @steps.setter
    def steps(self, value: int) -> None:
        for group in self.param_groups:
            group["steps"] = value

    @property
    def last_clipped_step(self) -> int | None:
        """The last step (counted from 1) at which QK-Clip scaled a head; None if none has.

        The clip switches itself off: the K2 report (appendix D) saw no head above tau
        after about 70,000 steps.
        """
        return self.param_groups[0]["last_clipped_step"]  # type: ignore[no-any-return]

    @last_clipped_step.setter
    def last_clipped_step(self, value: int | None) -> None:
        for group in self.param_groups:
            group["last_clipped_step"] = value

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient, then clip what was observed.

        Args:
            closure: evaluates the model anew and returns the loss, which is returned.

        Raises:
            ValueError: a maximum above tau that is only a bound; nothing is updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._clip = Clip.of(self._observed, self.qk_clip_threshold)
        self._observed = None
        for group in self.param_groups:
            group["steps"] += 1
            self._update(group)
        if self._clip.heads:
            self.last_clipped_step = self.steps
            self._scale_heads(self._clip)
        return loss

    def observe_max_logits(self, max_logits: Tensor, exact: Tensor | None = None) -> None:
        """Hand the next ``step`` the largest attention logits of its batch for QK-Clip.

        Args:
            max_logits: [layers, heads] signed, scaled as in the softmax, over unmasked pairs
                of the global batch; row i is layer ``layers.<i>``. -inf where none was seen.
            exact: [layers, heads] bool; False where the value only bounds the maximum from
                above, which is enough at or below tau. None: all are exact.

        Raises:
            ConfigError: QK-Clip is on without head dimensions, or the maxima do not fit the
                attention projections among the parameters.
        """
        if self.qk_clip_threshold is not None:
            layers = attention_layers(self.names.values())
            rows = {name: p.shape[0] for p, name in self.names.items()}
            require_fitting(max_logits, layers, rows, self.qk_head_dims)
        self._observed = Observation(max_logits, exact)

    @property
    def qk_clip_metrics(self) -> dict[str, float | int | None]:
        """What the last step clipped.

        ``max_logit`` (None where nothing was observed), ``number_clipped``, ``share_clipped``
        of the observed heads, and ``last_step``: the last step at which any was clipped.
        """
        return {
            "max_logit": self._clip.max_logit,
            "number_clipped": self._clip.heads,
            "share_clipped": self._clip.share,
            "last_step": self.last_clipped_step,
        }

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients; a ``main_grad`` is zeroed in place and stays where it is."""
        for parameter in self.names:
            main = getattr(parameter, "main_grad", None)
            if main is not None:
                main.zero_()
                if parameter.grad is not None and parameter.grad.data_ptr() == main.data_ptr():
                    continue  # autograd accumulates straight into main_grad
            if parameter.grad is not None and set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad = parameter.grad.detach().zero_()

    def named_state(self) -> Iterator[tuple[str, str, Tensor]]:
        """(parameter name, kind, tensor) of the whole state, created where it is missing.

        Kinds are master, momentum (Muon), exp_avg and exp_avg_sq (AdamW); tensors have
        their parameter's shape and may be written into, which is how a checkpoint loads.
        """
        for group in self.param_groups:
            for name, parameter in _named(group):
                for kind, tensor in self._state_of(group, name, parameter).items():
                    yield name, kind, tensor

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take over a ``state_dict()`` bit for bit; its tensors are copied.

        Raises:
            ConfigError: it was saved for parameters of other names.
            ValueError: it was saved for groups of other sizes.
        """
        require_same_names(self.param_groups, state_dict["param_groups"])
        hooked: StateDict = {}
        last = self.register_load_state_dict_pre_hook(lambda _, given: hooked.update(given))
        try:
            super().load_state_dict(state_dict)
        finally:
            last.remove()
        for group, saved in zip(self.param_groups, hooked["param_groups"], strict=True):
            # The base class narrows state to the parameter's dtype: masters would be lost.
            for parameter, key in zip(group["params"], saved["params"], strict=True):
                for kind, value in hooked["state"].get(key, {}).items():
                    dtype = accumulate_dtype(parameter.dtype)
                    self.state[parameter][kind] = value.detach().to(
                        parameter.device, dtype, copy=True
                    )

    def __getstate__(self) -> dict[str, Any]:
        kept = ("qk_clip_threshold", "qk_head_dims", "_observed", "_clip")
        return super().__getstate__() | {name: getattr(self, name) for name in kept}

    def _state_of(self, group: Group, name: str, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            dtype = accumulate_dtype(parameter.dtype)
            if parameter.dtype != dtype:
                state["master"] = parameter.detach().to(dtype)
            muon = group["use_muon"]
            if muon is None:
                muon = uses_muon(name, parameter.ndim)
            for kind in ("momentum",) if muon else ("exp_avg", "exp_avg_sq"):
                state[kind] = torch.zeros_like(parameter, dtype=dtype)
        return state

    def _update(self, group: Group) -> None:
        stacks: list[Stack] = []
        vectors: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        narrow: list[tuple[Tensor, Tensor]] = []
        for name, parameter in _named(group):
            gradient = _gradient(name, parameter)
            if gradient is None:
                continue
            state = self._state_of(group, name, parameter)
            weight = state.get("master", parameter)
            gradient = gradient.to(weight.dtype)
            if "momentum" in state:
                rounded = _matrices(parameter) if "master" in state else None
                views = (
                    _matrices(weight),
                    _matrices(gradient.contiguous()),
                    _matrices(state["momentum"]),
                )
                stacks.append(Stack(*views, rounded))
            else:
                vectors.append((weight, gradient, state["exp_avg"], state["exp_avg_sq"]))
                if "master" in state:
                    narrow.append((parameter, weight))
        muon_(stacks, _muon_settings(group))
        if vectors:
            weights, gradients, exp_avgs, exp_avg_sqs = zip(*vectors, strict=True)
            adamw_(
                weights,
                gradients,
                exp_avgs,
                exp_avg_sqs,
                step=group["steps"],
                lr=float(group["lr"]),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
            )
        for parameter, weight in narrow:
            parameter.copy_(weight)

    def _scale_heads(self, clip: Clip) -> None:
        """QK-Clip on the masters, after their update; the rounded weights follow them."""
        assert self.qk_head_dims is not None
        parameters = {name: parameter for parameter, name in self.names.items()}
        for layer in attention_layers(parameters):
            factors = clip.factors(layer.layer, self.qk_head_dims)
            if factors is None:
                continue
            for name, rows in zip((layer.q, layer.kv), factors, strict=True):
                parameter = parameters[name]
                weight = self.state[parameter].get("master", parameter)
                weight.mul_(rows.to(weight)[:, None])
                if weight is not parameter:
                    parameter.copy_(weight)


def _named(group: Group) -> Iterator[tuple[str, Tensor]]:
    return zip(group.get("param_names", ()), group["params"], strict=True)


def _gradient(name: str, parameter: Tensor) -> Tensor | None:
    gradient: Tensor | None = getattr(parameter, "main_grad", None)
    if gradient is None:
        gradient = parameter.grad
    if gradient is not None and gradient.is_sparse:
        raise RuntimeError(f"MuonClip takes dense gradients; that of {name} is sparse")
    return gradient


def _matrices(tensor: Tensor) -> Tensor:
    """[..., rows, cols] as a stack [count, rows, cols] that shares its memory."""
    return tensor.unsqueeze(0) if tensor.ndim == 2 else tensor.view(-1, *tensor.shape[-2:])


def _muon_settings(group: Group) -> MuonSettings:
    return MuonSettings(
        lr=float(group["lr"]),
        weight_decay=group["weight_decay"],
        momentum=group["momentum"],
        nesterov=group["nesterov"],
        update_rms=group["update_rms"],
        table=coefficient_table(group["ns_coefficients"]),
        dtype=group["ns_dtype"],
    )
