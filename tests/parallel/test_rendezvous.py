"""How ranks find each other; with real processes in tests/distributed/test_start.py."""

import pytest

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.parallel.rendezvous import Place, disagreement


def test_a_disagreement_names_the_odd_ones() -> None:
    """Catches a line that blames the majority, a key that only some ranks have, and a
    consequence (a digest) named before its cause."""
    assert disagreement([{"a": "1"}] * 3) is None
    assert disagreement([{"a": "1", "b": "2"}, {"b": "2", "a": "1"}]) is None
    error = disagreement([{"seed": "1", "digest": "1"}, {"seed": "2", "digest": "2"}])
    assert str(error).startswith("seed on rank 1: ")
    error = disagreement([{"a": "1", "seed": "2"}, {"a": "1"}, {"a": "1", "seed": "2"}])
    assert str(error).startswith("seed on rank 1: got 'nothing'; ")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_place_is_what_the_launcher_says(environment: pytest.MonkeyPatch) -> None:
    """Catches a process alone that waits for others, and ranks of several nodes that all take the
    first GPU."""
    assert Place.of_environment() == Place(0, 1, 0)
    for name, value in {"RANK": "9", "WORLD_SIZE": "16"}.items():
        environment.setenv(name, value)
    assert Place.of_environment() == Place(9, 16, 9)
    environment.setenv("LOCAL_RANK", "1")
    assert Place.of_environment() == Place(9, 16, 1)


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"RANK": "0"}, "WORLD_SIZE: got ''"),
        ({"WORLD_SIZE": "2"}, "RANK: got ''"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK: got 2"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK: got '-1'"),
        ({"RANK": "0", "WORLD_SIZE": "two"}, "WORLD_SIZE: got 'two'"),
    ],
)
def test_half_a_place_is_refused(
    environment: pytest.MonkeyPatch, variables: dict[str, str], line: str
) -> None:
    """Catches a rank that trains alone since its launcher named it by half."""
    for name, value in variables.items():
        environment.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        Place.of_environment()
    assert str(caught.value).startswith(line)
