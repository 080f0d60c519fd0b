"""MuonClip against plain references in fp64, torch's optimizers, and as one of them."""

import copy
import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

from kimi_pretrain.config.errors import ConfigError
from kimi_pretrain.optim import MuonClip, orthogonalize
from kimi_pretrain.optim.groups import uses_muon

Named = list[tuple[str, nn.Parameter]]

LR, DECAY, MU, RMS = 0.02, 0.1, 0.95, 0.2
SHAPES = {
    "model.embed_tokens.weight": (11, 6),
    "model.layers.0.self_attn.q_b_proj.weight": (24, 8),
    "model.layers.0.mlp.gate.weight": (4, 6),
    "model.layers.0.mlp.experts.gate_up_proj": (4, 2, 5, 6),
    "model.layers.0.mlp.experts.down_proj": (4, 6, 5),
    "model.layers.0.mlp.shared_experts.gate_up_proj": (2, 5, 6),
    "model.layers.1.mlp.gate_up_proj": (2, 5, 6),
    "model.norm.weight": (6,),
    "lm_head.weight": (11, 6),
}


def parameters(dtype: torch.dtype = torch.float64, seed: int = 0) -> Named:
    generator = torch.Generator().manual_seed(seed)
    return [
        (name, nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)))
        for name, shape in SHAPES.items()
    ]


def gradients(named: Named, step: int, scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1000 + step)
    return [
        scale * torch.randn(p.shape, generator=generator, dtype=torch.float64) for _, p in named
    ]


def train(optimizer: torch.optim.Optimizer, named: Named, steps: range) -> None:
    for step in steps:
        for (_, p), g in zip(named, gradients(named, step), strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()


def reference_newton_schulz(g: Tensor) -> Tensor:
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / x.norm()
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if g.shape[0] > g.shape[1] else x


class Reference:
    """Moonlight's equations for one matrix, or AdamW's, as plainly as they are written."""

    def __init__(self, name: str, weight: Tensor, nesterov: bool = True) -> None:
        self.weight = weight.detach().clone()
        self.muon = weight.ndim >= 2 and not any(s in name for s in ("embed_tokens", "lm_head"))
        self.nesterov = nesterov
        self.first = torch.zeros_like(self.weight)
        self.second = torch.zeros_like(self.weight)
        self.step_count = 0

    def step(self, g: Tensor) -> None:
        self.step_count += 1
        self.weight *= 1 - LR * DECAY
        if not self.muon:
            self.first = 0.9 * self.first + 0.1 * g
            self.second = 0.95 * self.second + 0.05 * g * g
            m = self.first / (1 - 0.9**self.step_count)
            v = self.second / (1 - 0.95**self.step_count)
            self.weight -= LR * m / (v.sqrt() + 1e-8)
            return
        self.first = MU * self.first + g  # the report's sum
        update = g + MU * self.first if self.nesterov else self.first
        rows, cols = g.shape[-2:]
        flat, out = update.reshape(-1, rows, cols), self.weight.view(-1, rows, cols)
        for i in range(flat.shape[0]):
            scale = RMS * math.sqrt(max(rows, cols))
            out[i] -= LR * scale * reference_newton_schulz(flat[i])


def assert_close(named: Named, expected: list[Tensor], rtol: float = 1e-9) -> None:
    for (name, p), want in zip(named, expected, strict=True):
        error = (p.detach() - want).abs() / want.abs().clamp_min(1e-6)
        worst = int(error.argmax())
        got, should = p.detach().flatten()[worst], want.flatten()[worst]
        assert error.max() <= rtol, f"{name}[{worst}]: {got:.17g}, expected {should:.17g}"


@pytest.mark.parametrize("nesterov", [True, False])
def test_four_steps_equal_the_equations_in_fp64(nesterov: bool) -> None:
    """Catches experts orthogonalised jointly, a scale by the wrong side, decay after the step."""
    named = parameters()
    optimizer = MuonClip(named, lr=LR, weight_decay=DECAY, momentum=MU, nesterov=nesterov)
    references = [Reference(name, p, nesterov) for name, p in named]
    for step in range(4):
        for (_, p), reference, g in zip(named, references, gradients(named, step), strict=True):
            p.grad = g
            reference.step(g)
        optimizer.step()
        assert_close(named, [r.weight for r in references])


def test_stacks_that_are_cut_into_chunks_are_updated_once_and_whole(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Catches matrices left out, or updated twice, where a chunk ends inside a stack."""
    one = 2 * (5 * 6 + 5 * 5) * 8  # bytes of a 5x6 matrix's buffers in fp64
    monkeypatch.setattr(orthogonalize, "_CPU_CHUNK_BYTES", 3 * one)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    named = parameters()  # 12 matrices of 5x6 in three stacks: chunks of 3
    references = [Reference(name, p) for name, p in named]
    for reference, g in zip(references, gradients(named, 0), strict=True):
        reference.step(g)
    train(MuonClip(named, lr=LR, weight_decay=DECAY), named, range(1))
    assert_close(named, [r.weight for r in references])


def test_one_shape_in_two_dtypes_is_rounded_where_it_must_be() -> None:
    """Catches bf16 weights given another parameter's master when both share a batch."""
    narrow = nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16())
    wide = nn.Parameter(torch.randn(6, 4, generator=torch.Generator().manual_seed(1)))
    expected = nn.Parameter(narrow.detach().clone())
    grad = torch.randn(6, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    for p in (narrow, wide, expected):
        p.grad = grad.to(p.dtype)
    MuonClip([("wide", wide), ("narrow", narrow)]).step()
    MuonClip([("alone", expected)]).step()
    assert torch.equal(narrow, expected)


def test_matrices_equal_torch_muon_in_fp64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a disagreement with torch.optim.Muon in anything but the dtype of its products."""
    # torch rounds to bf16 whatever it is given; without that it is the same algorithm in fp64.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())
    shapes = {"a.weight": (24, 8), "b.weight": (8, 24), "c.weight": (8, 24), "d.weight": (16, 16)}
    generator = torch.Generator().manual_seed(3)
    initial = {
        n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()
    }
    mine: Named = [(n, nn.Parameter(t.clone())) for n, t in initial.items()]
    theirs: Named = [(n, nn.Parameter(t.clone())) for n, t in initial.items()]
    settings = {"lr": LR, "weight_decay": DECAY, "momentum": MU}
    peer = torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)
    train(MuonClip(mine, **settings), mine, range(4))
    train(peer, theirs, range(4))
    assert_close(mine, [p.detach() for _, p in theirs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bf16_products_stay_as_near_to_torch_muon_as_rounding_allows(dtype: torch.dtype) -> None:
    """Catches an update of another size or direction where products are bf16 on both sides."""
    initial = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    mine: Named = [("w", nn.Parameter(initial.clone()))]
    theirs: Named = [("w", nn.Parameter(initial.float().clone()))]
    optimizer = MuonClip(mine, lr=LR, weight_decay=DECAY)
    peer = torch.optim.Muon(
        theirs, lr=LR, weight_decay=DECAY, momentum=MU, adjust_lr_fn="match_rms_adamw"
    )
    train(optimizer, mine, range(3))
    train(peer, theirs, range(3))
    state = {kind: tensor for _, kind, tensor in optimizer.named_state()}
    weight, expected = state.get("master", mine[0][1].detach()), theirs[0][1].detach()
    assert (weight - expected).norm() < 0.03 * (expected - initial.float()).norm()


def test_vectors_embedding_and_head_equal_torch_adamw_in_fp64() -> None:
    """Catches AdamW's betas, bias correction or decay going astray for one of them."""
    mine, theirs = parameters(), parameters()
    settings = {"lr": LR, "weight_decay": DECAY, "betas": (0.9, 0.95), "eps": 1e-8}
    train(MuonClip([{"params": mine, "use_muon": False}], **settings), mine, range(5))
    train(torch.optim.AdamW(theirs, **settings), theirs, range(5))
    assert_close(mine, [p.detach() for _, p in theirs])


def test_who_is_updated_by_muon() -> None:
    """Catches the head on Muon, the router on AdamW, or a name that merely contains lm_head."""
    muon = {name for name, shape in SHAPES.items() if uses_muon(name, len(shape))}
    adamw = {"model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"}
    assert muon == set(SHAPES) - adamw
    assert uses_muon("my_lm_head_adapter.weight", 2)
    optimizer = MuonClip(parameters())
    kinds = {(name, kind) for name, kind, _ in optimizer.named_state()}
    assert kinds == {(n, "momentum") for n in muon} | {
        (n, kind) for n in adamw for kind in ("exp_avg", "exp_avg_sq")
    }


def test_experts_do_not_see_each_other() -> None:
    """Catches one norm for a whole stack: a large expert would shrink the others' updates."""
    name = "layers.0.mlp.experts.down_proj"
    weight = torch.randn(3, 6, 4, dtype=torch.float64)
    grad = torch.randn(3, 6, 4, dtype=torch.float64)
    stacked = [(name, nn.Parameter(weight.clone()))]
    stacked[0][1].grad = grad * torch.tensor([1.0, 1e6, 0.0], dtype=torch.float64)[:, None, None]
    MuonClip(stacked, weight_decay=0.0).step()
    for expert in range(2):
        alone = [("w", nn.Parameter(weight[expert].clone()))]
        alone[0][1].grad = grad[expert]
        MuonClip(alone, weight_decay=0.0).step()
        assert torch.allclose(stacked[0][1][expert], alone[0][1], rtol=1e-9, atol=1e-12)
    assert torch.equal(stacked[0][1][2].detach(), weight[2])


def test_the_update_has_the_root_mean_square_of_adamw() -> None:
    """Catches a scale by rows, by sqrt(rows/cols) or by the Frobenius norm."""
    for shape in ((64, 256), (256, 64), (128, 128)):
        p = nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        MuonClip([("w", p)], lr=1.0, weight_decay=0.0, ns_dtype=torch.float32).step()
        rms = float(p.detach().square().mean().sqrt())
        assert rms == pytest.approx(0.2, rel=0.15), shape


def test_bf16_weights_follow_fp32_masters() -> None:
    """Catches updates lost to rounding: 300 steps far below bf16's resolution must add up."""
    named: Named = [
        ("w", nn.Parameter(torch.ones(8, 8, dtype=torch.bfloat16))),
        ("norm", nn.Parameter(torch.ones(8, dtype=torch.bfloat16))),
    ]
    optimizer = MuonClip(named, lr=1e-4, weight_decay=0.0)
    for _ in range(300):
        for _, p in named:
            p.grad = torch.eye(8, dtype=p.dtype) if p.ndim == 2 else torch.ones_like(p)
        optimizer.step()
    masters = {name: t for name, kind, t in optimizer.named_state() if kind == "master"}
    for name, p in named:
        assert masters[name].dtype == torch.float32
        assert torch.equal(p.detach(), masters[name].bfloat16())
        assert float(p.detach().diagonal().mean() if p.ndim == 2 else p.detach().mean()) < 0.985


def test_main_grad_is_preferred_and_read_at_its_own_precision() -> None:
    """Catches accumulated fp32 gradients replaced by the last microbatch's bf16 ones."""
    wanted = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    p = nn.Parameter(torch.zeros(6, 4, dtype=torch.bfloat16))
    p.grad = torch.randn(6, 4).bfloat16()
    p.main_grad = wanted.clone()  # type: ignore[attr-defined]
    optimizer = MuonClip([("w", p)])
    optimizer.step()
    momentum = next(t for _, kind, t in optimizer.named_state() if kind == "momentum")
    assert torch.equal(momentum, torch.zeros(6, 4).lerp(wanted, 1 - 0.95))


def test_zero_grad_keeps_main_grad_where_it_is() -> None:
    """Catches a zero_grad after which autograd accumulates beside the buffer that is read."""
    flat = torch.ones(8)
    aliased, beside = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
    aliased.main_grad, beside.main_grad = flat[:4], flat[4:]  # type: ignore[attr-defined]
    aliased.grad, beside.grad = flat[:4], torch.ones(4)
    plain = nn.Parameter(torch.zeros(4))
    plain.grad = torch.ones(4)
    optimizer = MuonClip([("a", aliased), ("b", beside), ("c", plain)])
    optimizer.zero_grad()
    assert not flat.any()
    assert aliased.grad is not None
    assert aliased.grad.data_ptr() == flat.data_ptr()
    assert beside.grad is None
    assert plain.grad is None
    plain.grad = torch.ones(4)
    optimizer.zero_grad(set_to_none=False)
    assert not plain.grad.any()


def test_parameters_without_a_gradient_are_left_alone() -> None:
    named = parameters()
    kept = [p.detach().clone() for _, p in named]
    optimizer = MuonClip(named)
    named[3][1].grad = torch.ones_like(named[3][1])
    optimizer.step()
    changed = [not torch.equal(p.detach(), k) for (_, p), k in zip(named, kept, strict=True)]
    assert changed == [i == 3 for i in range(len(named))]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_state_dict_continues_bitwise(dtype: torch.dtype) -> None:
    """Catches masters and moments that torch's load_state_dict narrows to bf16."""
    named = parameters(dtype)
    optimizer = MuonClip(named, lr=LR)
    train(optimizer, named, range(3))
    other: Named = [(name, nn.Parameter(p.detach().clone())) for name, p in named]
    resumed = MuonClip(other, lr=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(optimizer, named, range(3, 6))
    train(resumed, other, range(3, 6))
    for (name, p), (_, q) in zip(named, other, strict=True):
        assert torch.equal(p, q), name
    for (name, kind, mine), (_, _, theirs) in zip(
        optimizer.named_state(), resumed.named_state(), strict=True
    ):
        assert (
            mine.dtype
            == theirs.dtype
            == (torch.float64 if dtype == torch.float64 else torch.float32)
        )
        assert torch.equal(mine, theirs), (name, kind)
    assert resumed.steps == optimizer.steps == 6


def test_a_loaded_state_is_a_copy() -> None:
    """Catches two optimizers that step one momentum."""
    named = parameters()
    optimizer = MuonClip(named)
    train(optimizer, named, range(1))
    other = parameters()
    resumed = MuonClip(other)
    resumed.load_state_dict(optimizer.state_dict())
    before = [t.clone() for _, _, t in optimizer.named_state()]
    train(resumed, other, range(1, 2))
    assert all(
        torch.equal(t, b) for (_, _, t), b in zip(optimizer.named_state(), before, strict=True)
    )


def test_named_state_written_in_place_continues_bitwise() -> None:
    """Catches a checkpoint loaded through names that the next step does not see."""
    named = parameters(torch.bfloat16)
    optimizer = MuonClip(named, lr=LR)
    train(optimizer, named, range(3))
    saved = {(name, kind): t.clone() for name, kind, t in optimizer.named_state()}
    other: Named = [(name, nn.Parameter(p.detach().clone())) for name, p in named]
    resumed = MuonClip(other, lr=LR)
    for name, kind, tensor in resumed.named_state():
        tensor.copy_(saved[name, kind])
    resumed.steps = optimizer.steps
    train(optimizer, named, range(3, 5))
    train(resumed, other, range(3, 5))
    assert all(torch.equal(p, q) for (_, p), (_, q) in zip(named, other, strict=True))


def test_a_deep_copy_keeps_what_the_base_class_forgets() -> None:
    """Catches a copy without its clip threshold, which fails at the next step."""
    named = parameters()
    optimizer = MuonClip(named, qk_clip_threshold=50.0, qk_head_dims=(2, 1, 2))
    train(optimizer, named, range(1))
    copied = copy.deepcopy(optimizer)
    assert copied.qk_clip_threshold == 50.0
    assert copied.qk_head_dims == optimizer.qk_head_dims
    train(copied, [(name, p) for p, name in copied.names.items()], range(1, 2))
    assert copied.steps == 2


def test_closures_and_schedulers_drive_it_like_any_torch_optimizer() -> None:
    """Catches a learning rate read once, and a closure run without gradients."""
    layer = nn.Linear(4, 3).double()
    optimizer = MuonClip(layer.named_parameters(), lr=0.1, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: float(epoch == 0))
    x = torch.randn(5, 4, dtype=torch.float64)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = layer(x).square().mean()
        loss.backward()
        return loss

    before = layer.weight.detach().clone()
    loss = optimizer.step(closure)  # type: ignore[arg-type]
    assert loss is not None
    assert float(loss.detach()) > float(layer(x).detach().square().mean())
    assert not torch.equal(before, layer.weight)
    scheduler.step()
    before = layer.weight.detach().clone()
    optimizer.step(closure)  # type: ignore[arg-type]
    assert torch.equal(before, layer.weight)


def test_groups_have_settings_of_their_own_and_late_ones_their_own_step_count() -> None:
    """Catches AdamW's bias correction of a parameter that was added later."""
    early, late = parameters()[-1], parameters(seed=1)[-2]
    optimizer = MuonClip([{"params": [early], "lr": LR}], weight_decay=DECAY)
    train(optimizer, [early], range(3))
    optimizer.add_param_group({"params": [late], "lr": 2 * LR, "weight_decay": 0.0})
    expected = nn.Parameter(late[1].detach().clone())
    peer = torch.optim.AdamW([("w", expected)], lr=2 * LR, weight_decay=0.0, betas=(0.9, 0.95))
    train(optimizer, [late], range(3))
    train(peer, [("w", expected)], range(3))
    assert_close([late], [expected.detach()])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"named_parameters": nn.Linear(2, 2).parameters()}, "named_parameters"),
        ({"named_parameters": [{"params": list(nn.Linear(2, 2).parameters())}]}, "name"),
        ({"named_parameters": [("w", nn.Parameter(torch.zeros(2, 2)))] * 2}, "one parameter"),
        ({"lr": -1.0}, "lr"),
        ({"momentum": 1.0}, "momentum"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"betas": (0.9, 1.0)}, "betas"),
        ({"qk_clip_threshold": 0.0}, "qk_clip_threshold"),
        ({"ns_coefficients": "keller"}, "keller5"),
        (
            {
                "named_parameters": [
                    {"params": [("b", nn.Parameter(torch.zeros(2)))], "use_muon": True}
                ]
            },
            "matrices",
        ),
    ],
)
def test_misuse_is_one_line_that_says_what_to_do(arguments: dict[str, object], match: str) -> None:
    """Catches a bare TypeError for the commonest slip: parameters() for named_parameters()."""
    named = arguments.pop("named_parameters", None) or parameters()
    with pytest.raises(ConfigError, match=match) as error:
        MuonClip(named, **arguments)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_loading_the_state_of_other_parameters_is_refused() -> None:
    """Catches momenta silently given to the wrong matrices after a reordering."""
    named = parameters()
    optimizer = MuonClip(named)
    train(optimizer, named, range(1))
    swapped = MuonClip([*parameters()[4:], *parameters()[:4]])
    with pytest.raises(ConfigError, match="names"):
        swapped.load_state_dict(optimizer.state_dict())


def test_a_step_does_not_pay_for_the_compiler() -> None:
    """Catches torch._dynamo imported at start-up, 1.6 s of every run."""
    code = (
        "import sys, torch; from kimi_pretrain.optim import MuonClip;"
        "p = torch.nn.Parameter(torch.ones(2, 2)); p.grad = torch.ones(2, 2);"
        "o = MuonClip([('w', p), ('b', torch.nn.Parameter(torch.ones(2)))]);"
        "o.step(); o.zero_grad(); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
