"""The offload engine: the right values whatever the copies' timing, and no state out of turn."""

import gc
from collections import Counter, deque
from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks.offload_stress import Hasty, Late, Unheeded, poison, stress
from kimi_pretrain.activation.handles import Fp8Tile, Keep
from kimi_pretrain.activation.offload import MOVES, Offload, Offloader, OffloadError, State
from kimi_pretrain.ops.fp8_tiles import dequantise_tiles, quantise_tiles
from kimi_pretrain.ops.streams import ThreadStream, Ticket

CPU = torch.device("cpu")
ELEMENTS = 1000  # 4,000 bytes, 4,096 in the slab


class Broken(ThreadStream):
    """A copy engine that fails."""

    def run(self, work: Callable[[], None]) -> Ticket:
        def fails() -> None:
            work()
            raise OSError("no such link")

        return super().run(fails)


def kept(value: float) -> Offload:
    return Offload(Keep("norm_in", torch.full((ELEMENTS,), value)))


def test_a_thousand_steps_of_slow_copies_are_right() -> None:
    """Catches a tensor that is read before it is there, or overwritten before it was copied."""
    found = stress(CPU, 1000, ELEMENTS)
    assert (found.wrong, found.tensors, found.left_in_slab) == (0, 4000, 0)
    assert found.back > 1000 * ELEMENTS * 4


def test_a_missing_wait_is_seen() -> None:
    """Catches a stress test that would pass whatever the engine forgot."""
    assert stress(CPU, 50, ELEMENTS, broken=Hasty).wrong > 0


# --- a slab with room for two tensors, FP8 among them -------------------------------------------

ROWS, WIDTH = 16, 256
TILES = 4096 + 256  # bytes in the slab: codes and scales


class UnwaitedSettle(Offloader):
    """An engine that frees device memory before it was read."""

    def settle(self, mark: int) -> None:
        self._leaving = deque(replace(parcel, ticket=Unheeded()) for parcel in self._leaving)
        super().settle(mark)


class UnwaitedLoad(Offloader):
    """An engine whose tensors are read before they have come back."""

    def fetch(self, handles: Iterable[Offload]) -> Ticket | None:
        asked = list(handles)
        ticket = super().fetch(asked)
        for handle in asked:
            if handle.state is State.COMING:
                handle.ticket = Unheeded()
        return ticket


def crowded(
    kind: type[Offloader], steps: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[int, "Counter[tuple[State, State]]"]:
    """Steps with four microbatches in flight and room for two tensors; wrong values, and moves.

    A microbatch keeps one tensor as it is and one in FP8; of every fourth the backward comes at
    once.
    """
    moves: Counter[tuple[State, State]] = Counter()
    move = Offload.move

    def counted(handle: Offload, to: State) -> None:
        moves[handle.state, to] += 1
        move(handle, to)

    monkeypatch.setattr(Offload, "move", counted)
    stream = Late(ThreadStream("late copies"), CPU, 2e-4)
    engine = kind(CPU, 2 * TILES, stream, poison)
    wrong, number = 0, 0
    for _ in range(steps):
        held: list[list[tuple[Tensor, Offload]]] = []
        for _ in range(4):
            number += 1
            mark = engine.mark()
            rows = torch.full((ROWS, WIDTH), float(number), dtype=torch.bfloat16)
            tiles = [Fp8Tile("swiglu_in", rows, quantise_tiles, dequantise_tiles) for _ in "12"]
            plain = torch.full((ELEMENTS,), float(number))
            pairs = [(plain.clone(), Keep("norm_in", plain)), (tiles[0].load(), tiles[1])]
            held.append([(want, Offload(handle)) for want, handle in pairs])
            del rows, plain, tiles, pairs
            engine.settle(mark)
            engine.leave([handle for _, handle in held[-1]])
            if number % 4 == 0:  # wanted again while it leaves
                wrong += backward(engine, held.pop())
        while held:
            wrong += backward(engine, held.pop(0), *held[:1])
    engine.close()
    assert engine.slab.spans.used == 0
    return wrong, moves


def backward(engine: Offloader, *held: list[tuple[Tensor, Offload]]) -> int:
    """Read the first, and fetch it and the next ahead."""
    mark = engine.mark()
    for pairs in held:
        engine.fetch([handle for _, handle in pairs])
    wrong = sum(not torch.equal(handle.load(), want) for want, handle in held[0])
    engine.settle(mark)
    return wrong


def test_a_crowded_slab_gives_back_what_it_got(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a tensor that is lost where it waits for room, or is wanted while it leaves."""
    wrong, moves = crowded(Offloader, 250, monkeypatch)
    assert wrong == 0
    every = {(state, to) for state, following in MOVES.items() for to in following}
    assert set(moves) == every
    assert min(moves.values()) > 100


@pytest.mark.parametrize("kind", [UnwaitedSettle, UnwaitedLoad])
def test_each_missing_wait_is_seen(kind: type[Offloader], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stress test that would pass if one of the engine's two waits were gone."""
    wrong, _ = crowded(kind, 30, monkeypatch)
    assert wrong > 0


@pytest.mark.parametrize("state", State)
def test_only_listed_moves_are_possible(state: State) -> None:
    """Catches a handle that skips a state: freed without a copy, or fetched twice."""
    for to in State:
        handle = kept(0.0)
        handle.state = state
        if to in MOVES[state]:
            handle.move(to)
            assert handle.state is to
        else:
            with pytest.raises(OffloadError, match="cannot be"):
                handle.move(to)


def away(engine: Offloader, handle: Offload) -> None:
    engine.leave([handle])
    engine.settle(engine.mark())


def test_what_is_away_takes_no_device_memory_and_cannot_be_read() -> None:
    """Catches a copy beside the original, and a schedule without its prefetch."""
    engine, handle = Offloader(CPU, 4096), kept(3.0)
    away(engine, handle)
    assert handle.parts == []
    assert handle.state is State.AWAY
    with pytest.raises(OffloadError, match="norm_in is wanted while on the host: no PREFETCH"):
        handle.load()
    engine.fetch([handle])
    assert handle.load().eq(3.0).all()
    assert engine.slab.spans.used == 0


def test_a_full_slab_keeps_what_finds_no_room_until_there_is_some() -> None:
    """Catches a tensor that is lost, or a rank that dies, where experts got more than planned."""
    engine = Offloader(CPU, 2 * 4096)
    handles = [kept(float(value)) for value in range(4)]
    for handle in handles:
        away(engine, handle)
    assert [h.state for h in handles] == [State.AWAY] * 2 + [State.QUEUED] * 2
    engine.fetch(handles[:1])  # makes room for the third
    assert [h.state for h in handles[2:]] == [State.LEAVING, State.QUEUED]
    engine.settle(engine.mark())
    engine.fetch(handles[1:])
    assert [float(h.load()[0]) for h in handles] == [0.0, 1.0, 2.0, 3.0]
    assert engine.moved.stayed == 4000
    assert engine.slab.spans.used == 0


def test_what_is_wanted_while_it_leaves_stays() -> None:
    """Catches a fetch that copies back what its own copy out has not written yet."""
    engine = Offloader(CPU, 4096, Late(ThreadStream("slow"), CPU, 0.05), poison)
    handle = kept(5.0)
    engine.leave([handle])
    engine.fetch([handle])
    assert handle.state is State.BACK
    engine.settle(engine.mark())
    assert handle.load().eq(5.0).all()
    assert (engine.moved.back, engine.moved.stayed) == (0, 4000)


def test_a_dropped_tensor_gives_its_room_back() -> None:
    """Catches a slab that fills up with what a step that failed has left behind."""
    engine, handle = Offloader(CPU, 4096), kept(1.0)
    away(engine, handle)
    assert engine.slab.spans.used == 4096
    del handle
    gc.collect()
    assert engine.slab.spans.used == 0


def test_a_copy_that_fails_fails_whoever_waits() -> None:
    """Catches an error that ends with the thread it happened in."""
    engine, handle = Offloader(CPU, 4096), kept(1.0)
    away(engine, handle)
    engine.stream = Broken("broken copies")
    engine.fetch([handle])
    with pytest.raises(RuntimeError, match="beside the compute failed: no such link"):
        handle.load()


def test_several_parts_share_a_span() -> None:
    """Catches FP8 codes and their scales that overlap on the host."""
    engine, handle = Offloader(CPU, 2**14), kept(1.0)
    codes, scale = torch.arange(301, dtype=torch.uint8), torch.rand(7)
    handle.inner.parts[:] = [codes, scale]
    away(engine, handle)
    engine.fetch([handle])
    engine.stream.close()
    back: list[Tensor] = handle.inner.parts
    assert torch.equal(back[0], codes)
    assert torch.equal(back[1], scale)


def test_what_is_empty_takes_no_room() -> None:
    """Catches an expert that nobody chose: its span of no bytes is given back twice."""
    engine = Offloader(CPU, 2 * 4096)
    nothing = Offload(Keep("expert_up_in", torch.empty(0, 8)))
    first, second = kept(1.0), kept(2.0)
    for handle in (first, nothing, second):
        away(engine, handle)
    assert nothing.state is State.HERE
    engine.fetch([second, nothing, first])
    assert nothing.load().numel() == 0
    assert (float(first.load()[0]), float(second.load()[0])) == (1.0, 2.0)
    assert engine.slab.spans.used == 0


def test_who_waits_for_room_is_not_overtaken_and_what_never_fits_stays() -> None:
    """Catches a large tensor that small ones keep from ever leaving, or that keeps all others."""
    engine = Offloader(CPU, 2 * 4096)
    huge = Offload(Keep("norm_in", torch.zeros(5000)))
    large = Offload(Keep("norm_in", torch.zeros(2000)))
    first, small = kept(1.0), kept(2.0)
    engine.leave([huge, first, large, small])
    states = [handle.state for handle in (huge, first, large, small)]
    assert states == [State.HERE, State.LEAVING, State.QUEUED, State.QUEUED]
    assert engine.moved.stayed >= 20_000
    engine.settle(engine.mark())
    engine.fetch([first])
    assert (large.state, small.state) == (State.LEAVING, State.QUEUED)
    engine.fetch([huge, large, small])
    assert huge.load().numel() == 5000
