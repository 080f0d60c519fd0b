"""What a schedule's actions cost."""

import math

import pytest

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.pipeline.actions import Kind
from kimi_pretrain.pipeline.costs import Costs, Extra, Phases

COMPUTE_KINDS = (Kind.F, Kind.I, Kind.W, Kind.B)


def test_seconds_of_an_action() -> None:
    """Catches a B without its W, an all-to-all that computes, and an end on a wrong stage."""
    costs = Costs(
        layers=(1, 3),
        forward=Phases(1, 10, 2, 20),
        backward=Phases(3, 30, 4, 40),
        weight=Phases(attend=5, expert=6),
        first=Extra(100, 200, 300),
        last=Extra(1000, 2000, 3000),
    )
    assert [costs.compute_seconds(kind, 0) for kind in COMPUTE_KINDS] == [103, 207, 311, 518]
    assert [costs.compute_seconds(kind, 1) for kind in COMPUTE_KINDS] == [1009, 2021, 3033, 5054]
    assert [costs.alone_seconds(kind, 1) for kind in COMPUTE_KINDS] == [1099, 2231, 3033, 5264]
    lone = Costs((1,), Phases(), Phases(), first=costs.first, last=costs.last)
    assert lone.compute_seconds(Kind.B, 0) == 5500


def test_uniform() -> None:
    """Catches totals that land on two phases."""
    costs = Costs.uniform(2, forward=1, backward=2, weight=4, p2p=8)
    assert [costs.alone_seconds(kind, 0) for kind in COMPUTE_KINDS] == [1, 2, 4, 6]
    assert (costs.p2p, costs.layers) == (8, (1, 1))


@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_seconds_are_finite_and_not_negative(bad: float) -> None:
    """Catches time that runs backwards, or a NaN that only shows in the figure."""
    for make in (
        lambda: Costs((1,), Phases(expert=bad), Phases()),
        lambda: Costs((1,), Phases(), Phases(), last=Extra(weight=bad)),
        lambda: Costs((1,), Phases(), Phases(), p2p=bad),
    ):
        with pytest.raises(ConfigError, match="costs"):
            make()


def test_stages_have_layers_and_weights_do_not_communicate() -> None:
    """Catches costs of no stage, and an all-to-all that nothing would ever place."""
    for layers in ((), (1, 0)):
        with pytest.raises(ConfigError, match="at least one layer"):
            Costs(layers, Phases(), Phases())
    with pytest.raises(ConfigError, match="no all-to-all"):
        Costs((1,), Phases(), Phases(), weight=Phases(dispatch=1))
