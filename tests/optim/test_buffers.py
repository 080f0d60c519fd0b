"""Flat buffers: when a bucket travels, and what a module waits for."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kimi_pretrain.ops.linear import linear
from kimi_pretrain.optim.buckets import Spec
from kimi_pretrain.optim.buffers import ShardedBuffers
from kimi_pretrain.optim.layout import plan_layout
from kimi_pretrain.parallel.collectives import Group, Handle


class Recorder(Group):
    """A group of two whose peer always has zeros; tells what was started and awaited."""

    def __init__(self, kind: str, log: list[str]) -> None:
        super().__init__(kind, (0,))
        self.log = log

    @property
    def size(self) -> int:
        return 2

    def reduce_scatter(self, output: Tensor, input: Tensor) -> Handle:
        self.log.append(f"reduce {input.numel()}")
        return Handle(finish=lambda: self.log.append(f"reduced {input.numel()}"))

    def all_gather(self, output: Tensor, input: Tensor) -> Handle:
        self.log.append(f"gather {output.numel()}")
        return Handle(finish=lambda: self.log.append(f"gathered {output.numel()}"))


class Two(nn.Module):
    """Two linear layers, of 24 and of 12 weights."""

    def __init__(self) -> None:
        super().__init__()
        self.first = _Layer(6, 4)
        self.second = _Layer(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(self.first(x))
        return result


class _Layer(nn.Module):
    def __init__(self, rows: int, cols: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(rows, cols, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)


def _buffers(log: list[str]) -> tuple[Two, ShardedBuffers]:
    torch.manual_seed(0)
    model = Two()
    specs = [Spec(n, tuple(p.shape), True, False) for n, p in model.named_parameters()]
    layout = plan_layout(specs, edp=2, ep=1, dense="flat", bucket_elements=1)
    groups: dict[str, Any] = {"edp": Recorder("edp", log), "dp": Recorder("dp", log)}
    return model, ShardedBuffers(dict(model.named_parameters()), layout, groups)


def test_a_bucket_leaves_when_its_last_gradient_is_in() -> None:
    """Catches reductions that wait for the end of backward, or start with a microbatch to come."""
    log: list[str] = []
    model, buffers = _buffers(log)
    x = torch.randn(3, 4, dtype=torch.float64)
    buffers.expect(2)
    model(x).sum().backward()
    assert log == []  # one microbatch is to come
    hidden = model.first(x)
    hidden.register_hook(lambda grad: log.append("backward of the first layer"))
    model.second(hidden).sum().backward()
    assert log == ["reduce 12", "backward of the first layer", "reduce 24"]
    buffers.reduced()
    assert log[3:] == ["reduced 12", "reduced 24"]


def test_values_stay_and_gradients_accumulate_in_the_buffer() -> None:
    """Catches parameters that are copies, and gradients that the buffer does not hold."""
    torch.manual_seed(0)
    want = Two()
    model, buffers = _buffers([])
    for ours, theirs in zip(model.parameters(), want.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    x = torch.randn(3, 4, dtype=torch.float64)
    for _ in range(2):
        want(x).square().sum().backward()
        model(x).square().sum().backward()
    for ours, theirs in zip(model.parameters(), want.parameters(), strict=True):
        torch.testing.assert_close(ours.main_grad, theirs.grad)  # type: ignore[attr-defined]
    total = sum(float(b.gradients.square().sum()) for b in buffers.buckets)
    expected = sum(float(p.grad.square().sum()) for p in want.parameters() if p.grad is not None)
    assert total == pytest.approx(expected, rel=1e-12)
    buffers.zero()
    assert all(not p.main_grad.any() for p in model.parameters())  # type: ignore[attr-defined]


def test_a_module_waits_for_its_own_parameters_when_it_is_called() -> None:
    """Catches a forward with old weights, and one that waits for all layers at once."""
    log: list[str] = []
    model, buffers = _buffers(log)
    buffers.gate(model)
    for bucket in buffers.buckets:
        bucket.gather()
    del log[:]
    hidden = model.first(torch.randn(3, 4, dtype=torch.float64))
    assert log == ["gathered 24"]
    model.second(hidden)
    assert log == ["gathered 24", "gathered 12"]


def test_a_parameter_that_took_no_part_is_an_error() -> None:
    """Catches a bucket that is never reduced and an update from one replica's gradient."""
    model, buffers = _buffers([])
    buffers.expect(1)
    model.first(torch.randn(3, 4, dtype=torch.float64)).sum().backward()
    with pytest.raises(RuntimeError, match=r"second\.weight never came"):
        buffers.reduced()


def test_nonfinite_contributions_are_told_from_the_sum() -> None:
    """Catches a rank that is blamed for another's infinity in the shard it owns."""
    model, buffers = _buffers([])
    bucket = next(b for b in buffers.buckets if b.bucket.size == 24)
    buffers.expect(1)
    model(torch.randn(3, 4, dtype=torch.float64)).sum().backward()
    buffers.reduced()
    bucket.gradients[3] = float("inf")  # in this rank's shard: what the sum brought
    assert buffers.nonfinite() == []
    bucket.gradients[13] = float("inf")  # in the other's: this rank's own
    assert buffers.nonfinite() == ["first.weight"]


def test_who_lost_one_tensor_is_not_blamed_for_another() -> None:
    """Catches one verdict on a whole shard: a rank that lost one tensor of its shard would be named
    for what another rank gave to its neighbours in it."""
    torch.manual_seed(0)
    model = Two()
    specs = [Spec(n, tuple(p.shape), True, False) for n, p in model.named_parameters()]
    layout = plan_layout(specs, edp=2, ep=1, dense="flat", bucket_elements=100)
    groups: dict[str, Any] = {"edp": Recorder("edp", []), "dp": Recorder("dp", [])}
    buffers = ShardedBuffers(dict(model.named_parameters()), layout, groups)
    (bucket,) = buffers.buckets  # 12 elements of the second layer, then 24: this rank has 18
    buffers.expect(1)
    hidden = model.first(torch.randn(3, 4, dtype=torch.float64))
    bucket.gradients[0] = float("nan")  # the second layer's, of this rank
    model.second(hidden).sum().backward()
    buffers.reduced()
    bucket.gradients[13] = float("inf")  # the first layer's: what the sum brought
    assert buffers.nonfinite() == ["second.weight"]
    bucket.gradients[20] = float("inf")  # the first layer's, in the other's shard: this rank's own
    assert buffers.nonfinite() == ["second.weight", "first.weight"]


def test_a_gradient_after_the_reduction_began_is_an_error() -> None:
    """Catches a weight gradient that is computed twice: the second is missing from the sum, or
    is in it, as the transfer happens to read it."""
    model, buffers = _buffers([])
    buffers.expect(1)
    for _ in range(2):
        model.second(model.first(torch.randn(3, 4, dtype=torch.float64))).sum().backward()
    with pytest.raises(RuntimeError, match="came after its reduction had begun"):
        buffers.reduced()
