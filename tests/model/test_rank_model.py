"""A rank's chunks as one model."""

from collections.abc import Callable

import torch

from kimi_pretrain.config.schema import ModelConfig
from kimi_pretrain.model.build import from_config, rank_model
from kimi_pretrain.model.rank_model import RankModel
from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.parallel.dispatch import LocalDispatcher

STAGES = {3: range(3, 4), 0: range(1), 1: range(1, 2), 2: range(2, 3)}


class Half(LocalDispatcher):
    """The second half of the experts is here."""

    def experts(self, count: int) -> range:
        return range(count // 2, count)


def _ranks(config: ModelConfig, dispatcher: LocalDispatcher) -> list[RankModel]:
    """Two ranks of two stages each, as interleaving places them."""
    return [
        rank_model(config, {s: STAGES[s] for s in mine}, torch.float64, "cpu", 0, dispatcher)
        for mine in ((2, 0), (3, 1))
    ]


def test_ranks_hold_the_whole_model_between_them(tiny: Callable[..., ModelConfig]) -> None:
    """Catches names that count from 0 in every chunk, weights that depend on how the model is cut,
    and an order that follows how stages were given."""
    config = tiny(num_hidden_layers=4)
    whole = from_config(config, dtype=torch.float64)
    ranks = _ranks(config, LocalDispatcher())
    assert [list(rank.chunks) for rank in ranks] == [[0, 2], [1, 3]]
    for of in ("hf_named_parameters", "hf_named_buffers"):
        want = dict(getattr(whole, of)())
        got = [pair for rank in ranks for pair in getattr(rank, of)()]
        assert len(got) == len(want)
        for name, tensor in got:
            assert torch.equal(tensor, want[name]), name
    names = [name for name, _ in ranks[0].named_parameters()]
    assert names[0] == "model.embed_tokens.weight"
    layers = [name.split(".")[2] for name in names if ".layers." in name]
    assert layers == sorted(layers)
    assert set(layers) == {"0", "2"}


def test_what_a_rank_is_made_of(tiny: Callable[..., ModelConfig]) -> None:
    """Catches experts of another rank under this rank's names."""
    config = tiny(num_hidden_layers=4)
    _, rank = _ranks(config, Half())
    assert (rank.dtype, rank.device) == (torch.float64, torch.device("cpu"))
    assert rank.experts == range(6, 12)
    experts = {
        int(name.split(".experts.")[1].split(".")[0])
        for name, _ in rank.hf_named_parameters()
        if ".experts." in name
    }
    assert experts == set(range(6, 12))


def test_gradients_and_biases_of_all_chunks(tiny: Callable[..., ModelConfig]) -> None:
    """Catches a second chunk whose routers never move or whose gradients are not seen."""
    config = tiny(num_hidden_layers=4)
    _, rank = _ranks(config, LocalDispatcher())
    assert list(rank.hf_named_gradients()) == []
    for _, parameter in rank.named_parameters():
        parameter.main_grad = torch.ones_like(parameter)  # type: ignore[attr-defined]
    gradients = {name for name, _ in rank.hf_named_gradients()}
    assert gradients == {name for name, _ in rank.hf_named_parameters()}
    record = StepRecord.for_model(config, tau=None)
    record.expert_counts[:, 0] = 12  # all slots to one expert
    rank.update_router_bias(record, 0.5)
    biases = dict(rank.hf_named_buffers())
    assert {name.split(".")[2] for name in biases} == {"1", "3"}
    for bias in biases.values():
        assert bias[0] == -0.5
        assert bool((bias[1:] == 0.5).all())
