"""A sample follows the prompt within its context, and ends where the text does."""

from typing import Any

import torch
from torch import Tensor

from kimi_pretrain.parallel.collectives import Group
from kimi_pretrain.train.generate import generate

ALONE = Group("alone")
WIDTH = 8


class Successor:
    """A model that is sure that x + 1 follows x; it has eight rows, of which six have text."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        self.windows: list[list[int]] = []
        self.model = self
        self.chunks = {0: self}

    def lm_head(self, hidden: Tensor) -> Tensor:
        return 1e3 * hidden

    def run(self, batches: list[Any], record: object, last: Any) -> None:
        assert record is None
        ids = batches[0].tokens[0]
        self.windows.append(ids.tolist())
        last(0, torch.nn.functional.one_hot((ids + 1) % WIDTH, WIDTH).float()[None])


def sample(prompt: list[int], count: int, **given: Any) -> tuple[list[int], Successor]:
    forward = Successor()
    options = {"context": 3, "vocabulary": 6, "ranks": ALONE} | given
    return generate(forward, prompt, count, **options), forward  # type: ignore[arg-type]


def test_what_follows_is_returned_without_the_prompt_and_the_context_slides() -> None:
    """Catches a prompt that is told as the model's, and a window longer than it was trained on."""
    ids, forward = sample([0, 1, 2], 3)
    assert ids == [3, 4, 5]
    assert forward.windows == [[0, 1, 2], [1, 2, 3], [2, 3, 4]]


def test_a_stop_ends_it_and_is_not_told() -> None:
    """Catches an end of text decoded into the sample, and tokens drawn after it."""
    ids, forward = sample([0], 9, stop=3)
    assert ids == [1, 2]
    assert len(forward.windows) == 3
