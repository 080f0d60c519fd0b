"""What a layer keeps for its backward: the tags of the tensors, and the policy of each.

A tag names a kind of tensor, not one tensor: every norm's input is ``norm_in``. A policy is one
of ``POLICIES``; where it may not be any of them, the tag says which (design 4.4).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.nearest import nearest_name
from kimi_pretrain.config.schema import ActivationConfig


@dataclass(frozen=True)
class Policy:
    """How a tensor is kept between forward and backward."""

    recompute: bool = False  # not kept: computed again, once, when backward first needs it
    fp8: bool = False  # E4M3 in tiles of 1 x 128 with an fp32 scale each, for storage only
    offload: bool = False  # in the host's memory, where the schedule has the time to copy it

    def __str__(self) -> str:
        return next(text for text, policy in POLICIES.items() if policy == self)


POLICIES: Mapping[str, Policy] = {
    "keep": Policy(),
    "recompute": Policy(recompute=True),
    "fp8": Policy(fp8=True),
    "offload": Policy(offload=True),
    "fp8+offload": Policy(fp8=True, offload=True),
}

_ANYWHERE = ("keep", "offload")
_REMADE = ("keep", "recompute", "offload")
_WIDE = ("keep", "fp8", "offload", "fp8+offload")

# Weighed beside the tags: what a product read, once it waits for nothing but its weight's gradient,
# and the gradient of its output.
WAITING, GRADIENTS = "waiting for W", "gradients"

# tag -> the policies it may have
TAGS: Mapping[str, tuple[str, ...]] = {
    "tokens": _ANYWHERE,  # input of the embedding
    "norm_in": _ANYWHERE,  # input of every RMSNorm, and its scale, a number a token
    "norm_out": _REMADE,  # its output
    "mla_up": _REMADE,  # queries, keys and values: the up-projections of MLA, rotated
    "attn_out": _ANYWHERE,  # input of the output projection
    "attn_weights": _REMADE,  # softmax weights of short sequences (ops/attention.py)
    "router_in": _REMADE,  # the router's input in fp32
    "router": _ANYWHERE,  # scores, weights and their sums
    "route": _ANYWHERE,  # which expert, in which order
    "expert_up_in": _WIDE,  # rows at their experts
    "swiglu_in": _WIDE,  # gate and up of dense layers, shared and routed experts
    "swiglu_out": _REMADE,  # of routed experts before router weights act on it (before_down)
    "expert_down_in": _REMADE,  # input of every down-projection
    "expert_out": _ANYWHERE,  # rows that are back; only with router_weights=after_combine
    "head": _ANYWHERE,  # what the loss keeps
}

# Named policies of the whole; tags that are left out keep what they have.
PRESETS: Mapping[str, Mapping[str, str]] = {
    "none": {},
    # Kimi K2 (arXiv 2507.20534, section 2.4.3): recompute the cheap, FP8 for the wide, offload all
    # that remains. Experts' down-projections keep no output where router weights act before them.
    "k2": dict.fromkeys(TAGS, "offload")
    | {
        "norm_out": "recompute",
        "mla_up": "recompute",
        "attn_weights": "recompute",
        "router_in": "recompute",
        "swiglu_out": "recompute",
        "expert_down_in": "recompute",
        "expert_up_in": "fp8+offload",
        "swiglu_in": "fp8+offload",
        "tokens": "keep",
        "head": "keep",
    },
}
CUSTOM = "custom"


def policies(activation: ActivationConfig) -> dict[str, Policy]:
    """The policy of every tag.

    Raises:
        ConfigError: an unknown policy or tag, one that a tag cannot have, or tags without
            ``activation.policy=custom``.
    """
    known = (*PRESETS, CUSTOM)
    if activation.policy not in known:
        fix = f"activation.policy={nearest_name(activation.policy, known)}"
        rule = f"it is one of {', '.join(known)}"
        raise ConfigError("activation.policy", activation.policy, rule, fix)
    if activation.tags and activation.policy != CUSTOM:
        rule = f"activation.policy={activation.policy} says what happens to every tag"
        fix = f"activation.policy={CUSTOM}"
        raise ConfigError("activation.tags", activation.tags, rule, fix)
    chosen = PRESETS.get(activation.policy, activation.tags)
    for tag, text in chosen.items():
        if tag not in TAGS:
            fix = f"activation.tags.{nearest_name(tag, TAGS)}={text}"
            raise ConfigError("activation.tags", tag, f"the tags are {', '.join(TAGS)}", fix)
        if text not in TAGS[tag]:
            fix = f"activation.tags.{tag}={nearest_name(text, TAGS[tag])}"
            rule = f"of {tag} it is one of {', '.join(TAGS[tag])}"
            raise ConfigError(f"activation.tags.{tag}", text, rule, fix)
    return {tag: POLICIES[chosen.get(tag, "keep")] for tag in TAGS}


def offloads(activation: ActivationConfig) -> bool:
    """Whether any tag leaves the device."""
    return any(policy.offload for policy in policies(activation).values())
