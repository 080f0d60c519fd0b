"""Names of what lies in a bucket."""

from kimi_pretrain.optim.buckets import Spec
from kimi_pretrain.optim.layout import plan_layout
from kimi_pretrain.optim.piece import named_ranges


def test_stacks_are_named_in_the_order_of_their_memory() -> None:
    """Catches gate and up exchanged, and experts counted from zero on every rank."""
    layer = "model.layers.1.mlp"
    specs = [
        Spec(f"{layer}.experts.gate_up_proj", (2, 2, 3, 4), True, True),
        Spec(f"{layer}.shared_experts.gate_up_proj", (2, 3, 4), True, False),
        Spec("model.norm.weight", (5,), False, False),
    ]
    layout = plan_layout(specs, edp=1, ep=4)
    ranges = [r for bucket in layout.buckets for r in named_ranges(bucket, first_expert=6)]
    assert {(r.name, r.shape, r.start, r.stop) for r in ranges} == {
        (f"{layer}.experts.6.gate_proj.weight", (3, 4), 0, 12),
        (f"{layer}.experts.6.up_proj.weight", (3, 4), 12, 24),
        (f"{layer}.experts.7.gate_proj.weight", (3, 4), 24, 36),
        (f"{layer}.experts.7.up_proj.weight", (3, 4), 36, 48),
        (f"{layer}.shared_experts.gate_proj.weight", (3, 4), 0, 12),
        (f"{layer}.shared_experts.up_proj.weight", (3, 4), 12, 24),
        ("model.norm.weight", (5,), 0, 5),
    }
