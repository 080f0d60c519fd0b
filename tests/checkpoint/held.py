"""Ranks that hold training state in pieces cut anywhere, for tests of checkpoints."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kimi_pretrain.checkpoint.commit import commit
from kimi_pretrain.checkpoint.state import snapshot, write
from kimi_pretrain.optim.piece import Piece

Tensors = Mapping[tuple[str, str], Tensor]  # (kind, name) -> the whole
Cuts = Mapping[tuple[str, str], Sequence[tuple[int, int]]]  # (kind, name) -> (stop, rank) in order


class Held:
    """One rank's optimizer: its share of some tensors."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        self.steps = 0
        self.last_clipped_step: int | None = None
        self.published = 0

    def pieces(self) -> Iterator[Piece]:
        yield from self._pieces

    def publish(self) -> None:
        self.published += 1


class Buffers:
    """A model that has nothing but the routers' biases."""

    def __init__(self, bias: Tensor) -> None:
        self.bias = bias

    def hf_named_buffers(self) -> Iterator[tuple[str, Tensor]]:
        yield "model.layers.1.mlp.gate.e_score_correction_bias", self.bias


def deal(tensors: Tensors, cuts: Cuts, world: int) -> list[Held]:
    """The ranks of a world; pieces share memory with `tensors`."""
    shares: list[list[Piece]] = [[] for _ in range(world)]
    for key, tensor in tensors.items():
        start = 0
        for stop, rank in cuts[key]:
            values = tensor.view(-1)[start:stop]
            shares[rank].append(Piece(*key, tuple(tensor.shape), start, values))
            start = stop
        assert start == tensor.numel()
    return [Held(share) for share in shares]


def even(tensors: Tensors, world: int) -> Cuts:
    """Every tensor in `world` nearly even parts."""
    return {
        key: [((rank + 1) * tensor.numel() // world, rank) for rank in range(world)]
        for key, tensor in tensors.items()
    }


def save(root: Path, step: int, ranks: Sequence[Held], bias: Tensor) -> Path:
    """A checkpoint written by all ranks, the last one first, so that rank 0 finds all parts."""
    world = len(ranks)
    final = root
    for rank in reversed(range(world)):
        taken = snapshot(Buffers(bias), ranks[rank], {"step": step}, rank, world)
        final = commit(root, step, lambda d, taken=taken: write(d, taken), rank, world)
    return final


def random_bits(*shape: int, seed: int) -> Tensor:
    """fp32 of any bit pattern, NaNs included."""
    generator = torch.Generator().manual_seed(seed)
    bits = torch.randint(-(2**31), 2**31, shape, generator=generator, dtype=torch.int64)
    return bits.to(torch.int32).view(torch.float32)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))
