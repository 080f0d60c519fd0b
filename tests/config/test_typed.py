"""Plain values to dataclasses."""

from dataclasses import dataclass, field

import pytest

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.config.schema import Config
from kimi_pretrain.config.typed import build, defaults, dotted_keys


@dataclass
class Leaf:
    width: int
    scale: float = 1.0


@dataclass
class Tree:
    leaf: Leaf
    maybe: Leaf | None = None
    leaves: list[Leaf] = field(default_factory=list)
    named: dict[str, Leaf] = field(default_factory=dict)
    pair: tuple[float, float] = (0.9, 0.95)
    flag: bool = False
    text: str = ""


def test_nested_values_become_dataclasses() -> None:
    """Catches a list, dict or optional group that stays a plain dict."""
    plain = {
        "leaf": {"width": 1},
        "maybe": {"width": 2},
        "leaves": [{"width": 3}],
        "named": {"a": {"width": 4, "scale": 2}},
        "pair": [0.5, 1],
    }
    tree = build(Tree, plain)
    assert tree == Tree(Leaf(1), Leaf(2), [Leaf(3)], {"a": Leaf(4, 2.0)}, (0.5, 1.0))
    assert isinstance(tree.named["a"].scale, float)


@pytest.mark.parametrize(
    ("plain", "line"),
    [
        ({"leaf": {"width": "abc"}}, "leaf.width: got 'abc'; it must be an integer"),
        ({"leaf": {"width": 1.5}}, "leaf.width: got 1.5; it must be an integer; try leaf.width=2"),
        ({"leaf": {"width": True}}, "leaf.width: got True; it must be an integer"),
        ({"leaf": {"width": None}}, "leaf.width: got None; it must be an integer"),
        ({"leaf": {"width": float("inf")}}, "leaf.width: got inf; it must be an integer"),
        ({"leaf": {"width": "???"}}, "leaf.width: got '???'; it has no default"),
        ({"leaf": 3}, "leaf: got 3; it must be a group of keys"),
        (
            {"leaf": {"width": 1, "scal": 2}},
            "leaf.scal: got 2; no such key; the closest is leaf.",
        ),
        ({"leaf": {"width": 1}, "pair": [1]}, "pair: got [1]; it holds 2 values"),
        ({"leaf": {"width": 1}, "pair": "ab"}, "pair: got 'ab'; it must be a list"),
        ({"leaf": {"width": 1}, "leaves": [{"width": "x"}]}, "leaves.0.width: got 'x'"),
        ({"leaf": {"width": 1}, "named": {"a": 3}}, "named.a: got 3; it must be a group of keys"),
        ({"leaf": {"width": 1}, "flag": 5}, "flag: got 5; it must be true or false"),
        ({"leaf": {"width": 1}, "text": [1]}, "text: got [1]; it must be text"),
    ],
)
def test_what_does_not_fit_names_its_full_key(plain: dict[str, object], line: str) -> None:
    """Catches a value that is silently converted, and an error without the key's whole name."""
    with pytest.raises(ConfigError) as error:
        build(Tree, plain)
    assert str(error.value).startswith(line)


@pytest.mark.parametrize(
    ("value", "width"), [("7", 7), (7.0, 7), ("1_000", 1000), (10_000_000_000_000, 10**13)]
)
def test_numbers_in_other_clothes(value: object, width: int) -> None:
    """Catches environment variables (always text) and 1e3 being refused as integers."""
    assert build(Leaf, {"width": value}).width == width


def test_defaults_know_every_key() -> None:
    """Catches a key that an override could not reach because no file mentions it."""
    plain = defaults(Config)
    assert plain["optimizer"]["adam_betas"] == [0.9, 0.95]
    assert plain["model"]["hidden_size"] == "???"
    keys = set(dotted_keys(Config))
    assert {"model.rope_scaling", "model.rope_scaling.factor", "seed", "data.domains"} <= keys
    assert "model" not in keys
