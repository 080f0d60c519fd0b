"""One dial from which a whole K2-family model follows: the number of attention heads.

At 64 heads the dial gives Kimi K2's own widths exactly (arXiv 2507.20534, table 2; the
released configuration); below, it keeps the family's shape: MLA ratios, sparsity of one in
48 experts, one shared expert, first layer dense, a dense layer as wide as the experts that
one token meets. ``conf/model/k2_family.yaml`` reads it through the resolver ``k2_family``.
"""

from dataclasses import asdict, dataclass

from omegaconf import OmegaConf

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.nearest import nearest_name

SPARSITY = 48  # routed experts for each one that a token visits: K2's 384 / 8
LARGEST_DIAL = 64


@dataclass(frozen=True)
class FamilyWidths:
    """Widths (in elements) and counts of one member of the family, by their Hugging Face names."""

    num_attention_heads: int
    num_hidden_layers: int
    hidden_size: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    intermediate_size: int
    moe_intermediate_size: int
    n_routed_experts: int
    num_experts_per_tok: int


def _round_up(numerator: int, denominator: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below numerator / denominator."""
    step = denominator * multiple
    return -(-numerator // step) * multiple


def widths(dial: int) -> FamilyWidths:
    """The model of ``dial`` attention heads.

    Raises:
        ConfigError: the dial is not between 1 and 64.
    """
    if not 1 <= dial <= LARGEST_DIAL:
        nearest = min(max(1, dial), LARGEST_DIAL)
        rule = f"the dial counts attention heads, from 1 to {LARGEST_DIAL} (K2 itself)"
        raise ConfigError("model.dial", dial, rule, f"model.dial={nearest}")
    value_dim = min(128, 8 * dial)
    hidden = _round_up(7 * dial * value_dim, 8, 32)
    kv_lora = max(value_dim, _round_up(hidden, 14, 16))
    top_k = min(max(dial // 8, 2), 8)
    moe_intermediate = _round_up(18 * hidden, 7 * (top_k + 1), 16)
    return FamilyWidths(
        num_attention_heads=dial,
        num_hidden_layers=min(61, max(4, dial)),
        hidden_size=hidden,
        q_lora_rank=3 * kv_lora,
        kv_lora_rank=kv_lora,
        qk_nope_head_dim=value_dim,
        qk_rope_head_dim=value_dim // 2,
        v_head_dim=value_dim,
        intermediate_size=(top_k + 1) * moe_intermediate,
        moe_intermediate_size=moe_intermediate,
        n_routed_experts=SPARSITY * top_k,
        num_experts_per_tok=top_k,
    )


def _resolve(key: str, dial: object) -> int:
    """``${k2_family:hidden_size,4}`` in a configuration file."""
    if not isinstance(dial, int) or isinstance(dial, bool):
        raise ConfigError("model.dial", dial, "the dial is an integer", "model.dial=4")
    values = asdict(widths(dial))
    if key not in values:
        rule = f"the dial sets {', '.join(values)}"
        raise ConfigError("k2_family", key, rule, nearest_name(key, values))
    return int(values[key])


def register_resolver() -> None:
    """Make ``${k2_family:KEY,DIAL}`` known to OmegaConf; calling it again changes nothing."""
    OmegaConf.register_new_resolver("k2_family", _resolve, replace=True)
