"""A chunk under every policy: the same bits as with everything kept."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from kimi_pretrain.activation.handles import Recompute
from kimi_pretrain.activation.offload import Offloader
from kimi_pretrain.activation.saved import Activations, Saved, UntaggedError
from kimi_pretrain.config.activation import PRESETS, TAGS, policies
from kimi_pretrain.config.schema import ActivationConfig, ModelConfig
from kimi_pretrain.model.build import from_config
from kimi_pretrain.model.causal_lm import CausalLM
from kimi_pretrain.model.microbatch import Microbatch
from kimi_pretrain.model.record import StepRecord
from kimi_pretrain.model.tape import ChunkTape, backward_steps, forward_steps, straight
from kimi_pretrain.ops.kernels import REFERENCE
from kimi_pretrain.ops.registry import kernels_for
from kimi_pretrain.parallel.collectives import Group, Handle
from kimi_pretrain.parallel.dispatch import AllToAllDispatcher, Dispatcher, LocalDispatcher
from tests.model.reach import held_without_a_tag

TinyConfig = Callable[..., ModelConfig]
LENGTH = 17
CPU = torch.device("cpu")

RECOMPUTE = {tag: "recompute" for tag, allowed in TAGS.items() if "recompute" in allowed}
OFFLOAD = dict.fromkeys(TAGS, "offload")
EXACT_K2 = {tag: text.replace("fp8+", "") for tag, text in PRESETS["k2"].items()}


def custom(tags: Mapping[str, str]) -> Activations:
    chosen = policies(ActivationConfig("custom", dict(tags)))
    return Activations(chosen, Offloader(CPU, 2**22))


class Run:
    """One microbatch forwards and backwards through a whole model."""

    def __init__(
        self,
        model: CausalLM,
        activations: Activations,
        at_experts: bool,
        dispatcher: Dispatcher | None = None,
    ) -> None:
        torch.manual_seed(0)
        tokens, labels = torch.randint(model.config.vocab_size, (2, 2, LENGTH))
        documents = torch.arange(LENGTH).expand(2, -1) // 7
        dtype = model.lm_head.weight.dtype
        self.record = StepRecord.for_model(
            model.config, tau=0.01, aux_scale=1.0, dtype=torch.float64
        )
        shared = Microbatch.build(model.config, LENGTH, dtype, CPU, documents, self.record)
        self.dispatcher = dispatcher or LocalDispatcher(at_experts)
        self.shared = shared
        self.tapes: list[ChunkTape] = []

        def loss(hidden: Tensor) -> Tensor:
            value: Tensor = model.lm_head(hidden.flatten(0, 1), labels.flatten())
            return value

        self.loss = straight(
            forward_steps(
                model, tokens, shared, self.dispatcher, self.tapes.append, loss, activations
            )
        )

    def backward(self) -> None:
        straight(backward_steps(self.tapes[0], torch.ones_like(self.loss), self.dispatcher))

    @property
    def saved(self) -> Saved:
        return self.tapes[0].saved

    def held_without_a_tag(self) -> dict[str, Tensor]:
        """Beside what the whole model shares."""
        every = [*vars(self.shared).values(), *vars(self.record).values()]
        shared = {_storage(x) for x in every if isinstance(x, Tensor)}
        held = held_without_a_tag(self.tapes[0]).items()
        return {path: x for path, x in held if _storage(x) not in shared}


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class Twin(Group):
    """Two ranks of which one is not there: it sends what this one sends itself, the same tokens
    to the same experts, and of what it was sent nothing comes back."""

    def __init__(self) -> None:
        super().__init__("ep", (0, 1), 0, process_group="none")

    def all_to_all(
        self,
        output: Tensor,
        input: Tensor,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        name: str = "all_to_all",
    ) -> Handle:
        sent, *_ = input.split(input_splits or [len(input) // 2] * 2)
        for part in output.split(output_splits or [len(output) // 2] * 2):
            part.zero_()[: len(sent)] = sent[: len(part)]
        return Handle()


def _gradients(model: CausalLM) -> dict[str, Tensor]:
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name] = parameter.grad
    model.zero_grad()
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("at_experts", "vocabulary"),
    [(False, 61), (True, 61), (False, 2**17)],
    ids=["", "at experts", "cut head"],
)
@pytest.mark.parametrize("tags", [RECOMPUTE, OFFLOAD, EXACT_K2], ids=["again", "host", "k2"])
def test_gradients_are_the_same_bits(
    tiny: TinyConfig,
    tags: Mapping[str, str],
    at_experts: bool,
    vocabulary: int,
    dtype: torch.dtype,
) -> None:
    """Catches a chain that computes something else again, a copy that is not awaited, and a head
    that keeps, of a vocabulary that it cuts, what no tag names."""
    config = tiny(vocab_size=vocabulary)
    model = from_config(config, dtype=dtype, dispatcher=LocalDispatcher(at_experts))
    plain = Run(model, Activations.kept(), at_experts)
    plain.backward()
    want = _gradients(model)
    activations = custom(tags)
    assert activations.offloader is not None
    run = Run(model, activations, at_experts)
    activations.offloader.leave(run.saved.offloadable())
    activations.offloader.settle(activations.offloader.mark())
    if "offload" in tags.values():
        left = run.saved.device_bytes()
        assert not set(left) & {tag for tag, text in tags.items() if text == "offload"}
    activations.offloader.fetch(run.saved.offloadable())
    random = torch.get_rng_state()
    counts = run.record.expert_counts.clone()
    run.backward()
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(counts, run.record.expert_counts)
    assert torch.equal(run.loss, plain.loss)
    assert torch.equal(run.record.max_logits, plain.record.max_logits)
    for name, gradient in _gradients(model).items():
        assert torch.equal(gradient, want[name]), name
    assert activations.offloader.slab.spans.used == 0


@pytest.mark.parametrize("kernels", ["reference", "auto"])
@pytest.mark.parametrize("travels", [False, True], ids=["one rank", "two ranks"])
def test_every_saved_tensor_has_a_tag(tiny: TinyConfig, travels: bool, kernels: str) -> None:
    """Catches an operation whose saved tensor no policy reaches: the walk meets all tags, and
    finds no tensor in an attribute of a ``ctx``, in a closure or on the tape."""
    found: set[str] = set()
    chosen = kernels_for(kernels, "cpu", torch.bfloat16)
    for at_experts in (False, True):
        dispatcher = LocalDispatcher(at_experts, chosen)
        if travels:
            dispatcher = AllToAllDispatcher(Twin(), at_experts, chosen)
        model = from_config(tiny(), torch.bfloat16, dispatcher=dispatcher, kernels=chosen)
        run = Run(model, Activations.kept(), at_experts, dispatcher)
        found |= set(run.saved.device_bytes())
        assert list(run.held_without_a_tag()) == []
        for tags in (RECOMPUTE, PRESETS["k2"]):
            run = Run(model, custom(tags), at_experts, dispatcher)
            assert list(run.held_without_a_tag()) == []
    assert found == set(TAGS)


@pytest.mark.parametrize("place", ["ctx", "closure", "tape"])
def test_the_walk_sees_what_hooks_do_not(tiny: TinyConfig, place: str) -> None:
    """Catches a walk that finds nothing wherever it looks."""
    model = from_config(tiny(), dtype=torch.float32)
    run = Run(model, custom(RECOMPUTE), False)
    tape, hidden = run.tapes[0], torch.zeros(3)
    if place == "tape":
        tape.hidden = hidden  # type: ignore[attr-defined]
    elif place == "closure":
        chain = next(h._chain for h in run.saved.handles() if isinstance(h, Recompute))
        make = chain._make
        chain._make = lambda *inputs: (make, hidden)
    else:
        edge = tape.layers[0].attend._edges[0]
        assert edge is not None
        node = next(node for node, _ in edge.node.next_functions if hasattr(node, "weight"))
        node.hidden = hidden  # type: ignore[union-attr]
    assert [path for path in run.held_without_a_tag() if "hidden" in path]


def test_how_rows_travelled_leaves_the_device(tiny: TinyConfig) -> None:
    """Catches a route that stays where it is from forward to backward, and one that comes back
    as another."""
    dispatcher = AllToAllDispatcher(Twin())
    model = from_config(tiny(), torch.float64, dispatcher=dispatcher)
    plain = Run(model, Activations.kept(), False, dispatcher)
    plain.backward()
    want = _gradients(model)
    activations = custom({"route": "offload"})
    offloader = activations.offloader
    assert offloader is not None
    run = Run(model, activations, False, dispatcher)
    storages = [
        StorageWeakRef(part.untyped_storage())  # type: ignore[no-untyped-call]
        for handle in run.saved.offloadable()
        for part in handle.parts
    ]
    offloader.leave(run.saved.offloadable())
    offloader.settle(offloader.mark())
    assert storages
    assert all(storage.expired() for storage in storages)  # type: ignore[no-untyped-call]
    offloader.fetch(run.saved.offloadable())
    run.backward()
    for name, gradient in _gradients(model).items():
        assert torch.equal(gradient, want[name]), name


def test_an_untagged_tensor_is_an_error(tiny: TinyConfig) -> None:
    """Catches a walk that lets pass what it does not know."""
    saved = Saved(Activations.kept())
    x = torch.randn(3, requires_grad=True)
    match = r"\(3,\) torch.float32 for backward, which no tag"
    with pytest.raises(UntaggedError, match=match), saved.watching():
        (x * x.sin()).sum()


def test_recomputed_tags_take_no_memory(tiny: TinyConfig) -> None:
    """Catches a chain that keeps its result next to its recipe."""
    model = from_config(tiny(), dtype=torch.float32)
    run = Run(model, custom(RECOMPUTE), at_experts=False)
    assert not set(run.saved.device_bytes()) & set(RECOMPUTE)


def test_fp8_tags_take_half_the_memory(tiny: TinyConfig) -> None:
    """Catches tiles that lie beside the tensor that they were cut from."""
    tags = {"expert_up_in": "fp8", "swiglu_in": "fp8"}
    model = from_config(tiny(hidden_size=128), dtype=torch.bfloat16)
    plain, run = Run(model, Activations.kept(), False), Run(model, custom(tags), False)
    kept, small = plain.saved.device_bytes(), run.saved.device_bytes()
    assert small["expert_up_in"] == kept["expert_up_in"] * (1 + 4 / 128) / 2
    assert small["norm_in"] == kept["norm_in"]


def test_a_chain_runs_once(tiny: TinyConfig) -> None:
    """Catches a norm that is computed again for each of the projections that read it."""
    calls: list[int] = []

    def counted(x: Tensor, weight: Tensor, eps: float) -> Tensor:
        calls.append(id(weight))
        normalised: Tensor = REFERENCE.rms_norm(x, weight, eps)
        return normalised

    kernels = replace(REFERENCE, rms_norm=counted)
    model = from_config(tiny(), dtype=torch.float64, kernels=kernels)
    run = Run(model, custom(RECOMPUTE), at_experts=False)
    calls.clear()
    run.backward()
    in_layers = sum("norm.weight" in name for name, _ in model.model.layers.named_parameters())
    assert len(calls) == len(set(calls)) >= in_layers > 0
