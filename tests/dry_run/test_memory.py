"""Live bytes: what torch frees is gone, what only a view or a graph holds is not."""

import torch

from kimi_pretrain.dry_run.memory import LiveBytes


def test_a_storage_counts_once_until_its_last_view_is_gone() -> None:
    """Catches views counted as memory, and memory that counts as freed while a view is left."""
    memory = LiveBytes()
    whole = torch.empty(1000, device="meta")
    memory.show(whole)
    view = whole[:10]
    memory.show(view)
    assert memory.now == 4000
    del whole
    assert memory.now == 4000
    del view
    assert (memory.now, memory.peak) == (0, 4000)


def test_what_a_graph_saves_is_alive() -> None:
    """Catches activations that nobody but autograd holds counted as freed."""
    memory = LiveBytes()
    x = torch.empty(10, 100, device="meta", requires_grad=True)
    inner = x.exp()
    memory.show(inner)
    total = inner.sum()
    del inner
    assert memory.now == 4000
    torch.autograd.backward([total])
    assert memory.now == 0


def test_new_memory_belongs_to_whom_it_is_given() -> None:
    """Catches bytes given to the one before, given twice, or kept by their maker when freed."""
    memory = LiveBytes()
    first, passing, second = (torch.empty(n, device="meta") for n in (10, 20, 30))
    memory.show(first)
    memory.show(passing)
    del passing
    memory.label("a")
    memory.show(second)
    memory.label("b")
    assert (memory.of["a"], memory.of["b"], memory.of[""]) == (40, 120, 0)
    del first
    assert (memory.of["a"], memory.now) == (0, 120)


def test_memory_that_is_given_away_is_no_one_else_s() -> None:
    """Catches a gradient that waits counted as its phase's too, or as new once it is freed."""
    memory = LiveBytes()
    made, new = (torch.empty(n, device="meta") for n in (10, 20))
    memory.show(made)
    memory.label("a phase")
    memory.show(new)
    for tensor in (made, new):
        memory.give(tensor, "until W")
    memory.label("the next phase")
    assert memory.of["until W"] == 120
    assert memory.of["a phase"] == memory.of["the next phase"] == memory.of[""] == 0
    del made, new, tensor
    assert (memory.of["until W"], memory.now) == (0, 0)
