"""QK-Clip: weights rescaled so that no attention logit stays above tau (arXiv 2507.20534, Alg. 1).

A head whose largest logit S of the step exceeds tau gets gamma = tau / S, spread over the two
sides of the product: its q_nope and k_nope rows times sqrt(gamma), its q_rope rows times
gamma, because k_rope is shared by all heads and stays as it is. The other heads, and every
value row, are multiplied by exactly 1.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from kimi_pretrain.config.errors import ConfigError

_ATTENTION = re.compile(r"(?:^|\.)layers\.(\d+)\.self_attn\.(q_proj|q_b_proj|kv_b_proj)\.weight$")


@dataclass(frozen=True)
class HeadDims:
    """Rows of one head: q has nope then rope rows, kv_b has nope (keys) then v (values)."""

    nope: int
    rope: int
    v: int


def clipped_heads(max_logits: Tensor, tau: float) -> Tensor:
    """Which heads are to be clipped; bool of the maxima's shape.

    A maximum that is not finite clips nothing: such a step has no sound update at all, and
    scaling a head by zero would destroy it for good.
    """
    return (max_logits > tau) & torch.isfinite(max_logits)


def qk_clip_factors(
    max_logits: Tensor, tau: float, nope: int, rope: int, v: int
) -> tuple[Tensor, Tensor]:
    """Factors of the rows of q_proj (or q_b_proj) and of kv_b_proj of one layer.

    Args:
        max_logits: [heads] largest scaled logit of each head in the step, signed; -inf for a
            head that saw none.
        tau: the threshold, above 0.
        nope: rows of a head without rotary embedding, in q and in k.
        rope: rows of a head with it, in q only (those of k are shared by the heads).
        v: rows of a head's values.

    Returns:
        [heads * (nope + rope)] and [heads * (nope + v)], in the maxima's dtype; exactly 1.0
        for rows that stay as they are, whatever the other heads' maxima.
    """
    # Untouched heads get gamma 1 before the root, so that a negative maximum is never under it.
    gamma = torch.where(clipped_heads(max_logits, tau), tau / max_logits, 1.0)
    root = gamma.sqrt()
    one = torch.ones_like(gamma)
    q = [root[:, None].expand(-1, nope), gamma[:, None].expand(-1, rope)]
    kv = [root[:, None].expand(-1, nope), one[:, None].expand(-1, v)]
    return torch.cat(q, dim=1).flatten(), torch.cat(kv, dim=1).flatten()


@dataclass(frozen=True)
class Observation:
    """The largest logits of a step's batch, [layers, heads] as ``observe_max_logits`` takes."""

    max_logits: Tensor
    exact: Tensor | None


@dataclass(frozen=True)
class Clip:
    """What one step clips: decided before its update, applied after it."""

    tau: float
    max_logits: Tensor | None
    max_logit: float | None  # the largest of all heads
    heads: int  # clipped
    share: float  # clipped, of those observed

    @classmethod
    def of_nothing(cls) -> "Clip":
        return cls(tau=math.inf, max_logits=None, max_logit=None, heads=0, share=0.0)

    @classmethod
    def of(cls, observed: Observation | None, tau: float | None) -> "Clip":
        """The clip that an observation calls for; without a threshold it only measures.

        Raises:
            ValueError: a value above tau is a bound and no maximum.
        """
        if observed is None:
            return cls.of_nothing()
        maxima = observed.max_logits
        tau = math.inf if tau is None else tau
        clipped = clipped_heads(maxima, tau)
        if observed.exact is not None and bool((clipped & ~observed.exact).any()):
            raise ValueError(
                f"QK-Clip needs exact maxima above tau={tau}: the forward passes took another tau"
            )
        heads = int(clipped.sum())
        return cls(tau, maxima, float(maxima.max()), heads, heads / maxima.numel())

    def factors(self, layer: int, dims: HeadDims) -> tuple[Tensor, Tensor] | None:
        """Row factors of one layer's q and kv_b projections; None where none is touched."""
        if self.max_logits is None or not bool(
            clipped_heads(self.max_logits[layer], self.tau).any()
        ):
            return None
        return qk_clip_factors(self.max_logits[layer], self.tau, dims.nope, dims.rope, dims.v)


@dataclass(frozen=True)
class AttentionNames:
    """Parameter names of one layer's clipped projections."""

    layer: int
    q: str  # q_proj or q_b_proj: [heads * (nope + rope), ...]
    kv: str  # kv_b_proj: [heads * (nope + v), ...]


def attention_layers(names: Iterable[str]) -> list[AttentionNames]:
    """The layers with multi-head latent attention among parameter names, in order."""
    found: dict[int, dict[str, str]] = {}
    for name in names:
        if match := _ATTENTION.search(name):
            side = "kv" if match[2] == "kv_b_proj" else "q"
            found.setdefault(int(match[1]), {})[side] = name
    return [
        AttentionNames(layer, sides["q"], sides["kv"])
        for layer, sides in sorted(found.items())
        if len(sides) == 2
    ]


def require_fitting(
    max_logits: Tensor, layers: list[AttentionNames], rows: dict[str, int], dims: HeadDims | None
) -> HeadDims:
    """The head dimensions, if the maxima [layers, heads] belong to these projections.

    Raises:
        ConfigError: no head dimensions, no such projections, a layer without a row of
            maxima, or another number of rows than the heads have.
    """
    if dims is None:
        rule = "QK-Clip scales rows by head and needs (nope, rope, v)"
        raise ConfigError("qk_head_dims", None, rule, "(128, 64, 128)")
    if max_logits.ndim != 2 or not layers or layers[-1].layer >= max_logits.shape[0]:
        raise ConfigError(
            "max_logits",
            list(max_logits.shape),
            f"it is [layers, heads] for the {len(layers)} layers whose "
            "layers.<i>.self_attn.{q_proj | q_b_proj, kv_b_proj}.weight are optimized",
            f"a row for each of {[names.layer for names in layers]}",
        )
    heads = max_logits.shape[1]
    for names in layers:
        for name, per_head in ((names.q, dims.nope + dims.rope), (names.kv, dims.nope + dims.v)):
            if rows[name] != heads * per_head:
                raise ConfigError(
                    f"rows of {name}",
                    rows[name],
                    f"{heads} heads of {per_head} rows are {heads * per_head}",
                    f"qk_head_dims that fit, not {(dims.nope, dims.rope, dims.v)}",
                )
    return dims
