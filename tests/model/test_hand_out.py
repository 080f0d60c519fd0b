"""A whole model with native kernels against the same model in plain torch."""

from collections.abc import Callable
from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor

from kimi_pretrain.activation.saved import Activations
from kimi_pretrain.config.activation import TAGS, policies
from kimi_pretrain.config.schema import ActivationConfig, ModelConfig
from kimi_pretrain.model.build import from_config
from kimi_pretrain.model.causal_lm import CausalLM
from kimi_pretrain.model.microbatch import Microbatch
from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.model.tape import ChunkTape, backward_steps, forward_steps, straight
from kimi_pretrain.ops.kernels import REFERENCE, Kernels
from kimi_pretrain.ops.native import library
from kimi_pretrain.ops.registry import kernels_for
from kimi_pretrain.parallel.dispatch import LocalDispatcher

TinyConfig = Callable[..., ModelConfig]
LENGTH = 17
DTYPES = [torch.bfloat16, torch.float32]


def config(tiny: TinyConfig) -> ModelConfig:
    """Every token takes every expert: no choice hangs on the last bit of a score."""
    return tiny(n_routed_experts=4, num_experts_per_tok=4)


def model_of(cfg: ModelConfig, dtype: torch.dtype, kernels: Kernels) -> CausalLM:
    """Weights of every dtype are those of the bf16 model, so that only computation differs."""
    model = from_config(cfg, dtype=dtype, kernels=kernels)
    source = from_config(cfg, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter, of in zip(model.parameters(), source.parameters(), strict=True):
            parameter.copy_(of)
            parameter.main_grad = torch.zeros(  # type: ignore[attr-defined]
                parameter.shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32
            )
    return model


def run(
    model: CausalLM, activations: Activations | None = None
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Loss, main gradients and logit maxima of one microbatch, phase by phase, tags watched."""
    torch.manual_seed(0)
    tokens, labels = torch.randint(model.config.vocab_size, (2, 2, LENGTH))
    documents = torch.arange(LENGTH).expand(2, -1) // 7
    dtype = model.lm_head.weight.dtype
    record = StepRecord.for_model(model.config, tau=0.01, aux_scale=1.0, dtype=torch.float64)
    cpu = torch.device("cpu")
    microbatch = Microbatch.build(model.config, LENGTH, dtype, cpu, documents, record)
    tapes: list[ChunkTape] = []

    def loss_of(hidden: Tensor) -> Tensor:
        value: Tensor = model.lm_head(hidden.flatten(0, 1), labels.flatten())
        return value

    ways = (model, tokens, microbatch, model.dispatcher, tapes.append, loss_of)
    loss = straight(forward_steps(*ways, activations or Activations.kept()))
    straight(backward_steps(tapes[0], torch.ones_like(loss), model.dispatcher))
    gradients = {n: p.main_grad.double() for n, p in model.named_parameters()}
    return loss.double(), gradients, record.max_logits


def counted(kernels: Kernels) -> tuple[Kernels, dict[str, int]]:
    """The same kernels, and how often each is called."""
    calls = dict.fromkeys((field.name for field in fields(Kernels)), 0)

    def counting(name: str) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            calls[name] += 1
            return getattr(kernels, name)(*arguments)

        return call

    return Kernels(**{name: counting(name) for name in calls}), calls


def distance(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_is_as_close_to_fp64_as_plain_torch(tiny: TinyConfig, dtype: torch.dtype) -> None:
    """Catches a kernel with another meaning, a gradient that misses its weight's sum, a tensor
    saved without a tag, and a module that was not handed its kernels."""
    if library.missing() is not None:
        pytest.skip(f"no native kernels: {library.missing()}")
    cfg = config(tiny)
    kernels, calls = counted(kernels_for("native", "cpu", dtype))
    loss, gradients, maxima = run(model_of(cfg, dtype, kernels))
    plain_loss, plain_gradients, plain_maxima = run(model_of(cfg, dtype, REFERENCE))
    exact_loss, exact_gradients, exact_maxima = run(model_of(cfg, torch.float64, REFERENCE))
    used = {name for name, count in calls.items() if count}
    assert used >= {"swiglu", "rms_norm", "take_rows", "weighted_rows", "max_logits", "attention",
                    "grouped_linear", "add_product"}  # fmt: skip
    slack = 2.0**-9 if dtype == torch.bfloat16 else 1e-6
    assert abs(loss - exact_loss) <= 1.5 * abs(plain_loss - exact_loss) + slack
    plain_distance = distance(plain_maxima, exact_maxima)
    assert distance(maxima, exact_maxima) <= 1.5 * plain_distance + slack
    ratios = []
    for name, want in exact_gradients.items():
        mine, theirs = distance(gradients[name], want), distance(plain_gradients[name], want)
        ratios.append((mine + slack) / (theirs + slack))
        assert ratios[-1] <= 3, f"{name}: {mine:.2e}, plain torch {theirs:.2e}"
    assert sum(ratios) / len(ratios) <= 1.2, ratios  # roundings differ; on average they do not


@pytest.mark.parametrize("at_experts", [False, True])
def test_native_recomputed_equals_native_kept(tiny: TinyConfig, at_experts: bool) -> None:
    """Catches a kernel that saves its own copy of what is to be computed again, or whose second
    result is not its first."""
    if library.missing() is not None:
        pytest.skip(f"no native kernels: {library.missing()}")
    kernels = kernels_for("native", "cpu", torch.bfloat16)
    again = {tag: "recompute" for tag, allowed in TAGS.items() if "recompute" in allowed}
    results = []
    for activations in (None, Activations(policies(ActivationConfig("custom", again)))):
        model = model_of(config(tiny), torch.bfloat16, kernels)
        model.dispatcher = LocalDispatcher(at_experts, kernels)
        loss, gradients, maxima = run(model, activations)
        results.append([loss, maxima, *gradients.values()])
    for kept, recomputed in zip(*results, strict=True):
        assert torch.equal(kept, recomputed)


def test_fp64_is_plain_torch_whatever_is_built() -> None:
    """Catches a parity run that is rounded to fp32 in a kernel."""
    assert kernels_for("auto", "cpu", torch.float64) == REFERENCE


def test_a_model_is_plain_torch_unless_it_is_handed_kernels(tiny: TinyConfig) -> None:
    """Catches kernels of one model that leak into the next through a class."""
    kernels = replace(REFERENCE, swiglu=torch.nn.functional.silu)
    first = from_config(config(tiny), kernels=kernels)
    second = from_config(config(tiny))
    mlp = "model.layers.0.mlp"
    assert first.get_submodule(mlp).kernels is kernels
    assert second.get_submodule(mlp).kernels is REFERENCE
