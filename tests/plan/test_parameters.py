"""Parameter counts against the published configurations (reference figures)."""

import pytest

from kimi_pretrain.config import compose
from kimi_pretrain.plan.parameters import count_parameters

PUBLISHED = {
    "k2": (1_026_408_209_408, 23_040, 30_512_667_648, 31_687_072_768, 32_861_477_888),
    "deepseek_v3": (671_026_404_352, 14_848, 35_698_924_544, 36_625_603_584, 37_552_282_624),
    "moonlight_16b": (15_960_108_544, 1_664, 2_243_685_888, 2_579_230_208, 2_914_774_528),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_equal_the_published_models(name: str) -> None:
    """Catches a forgotten norm, a router counted twice, or a shared expert left out."""
    count = count_parameters(compose([f"model={name}"]).model)
    assert (
        count.total,
        count.router_bias,
        count.active_without_embedding,
        count.active_with_head,
        count.active_with_both,
    ) == PUBLISHED[name]
