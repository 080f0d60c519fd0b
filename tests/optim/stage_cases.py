"""Stages to lay out: random small ones on up to 4,096 ranks, and Kimi K2's; what they lend."""

from collections import Counter
from functools import cache

from hypothesis import strategies as st

from kimi_pretrain.config import compose
from kimi_pretrain.optim.layout import Layout, Spec, plan_layout
from kimi_pretrain.plan.shapes import stage_specs
from kimi_pretrain.plan.stages import stage_layers

K2_PP, K2_EP = 16, 16
K2_EDP = {256: 1, 512: 2, 2048: 8}  # ranks -> replicas of an expert

# Few sides, so that shapes repeat, and odd ones, so that shards cut anywhere.
_SIDES = st.sampled_from((1, 2, 3, 5, 8))
_KINDS = st.sampled_from(("expert", "stack", "matrix", "embedding", "norm"))


@st.composite
def _spec(draw: st.DrawFn, number: int) -> Spec:
    kind = draw(_KINDS)
    matrix = (draw(_SIDES), draw(_SIDES))
    if kind == "expert":
        shape = (draw(st.integers(1, 12)), *((2,) if draw(st.booleans()) else ()), *matrix)
        return Spec(f"{number}.experts", shape, muon=True, expert=True)
    if kind == "stack":
        return Spec(f"{number}.gate_up", (2, *matrix), muon=True, expert=False)
    if kind == "matrix":
        return Spec(f"{number}.weight", matrix, muon=True, expert=False)
    if kind == "embedding":
        return Spec(f"{number}.embed_tokens", matrix, muon=False, expert=False)
    return Spec(f"{number}.norm", (draw(st.integers(1, 9)),), muon=False, expert=False)


@st.composite
def stages(draw: st.DrawFn, most_ranks: int = 4096) -> dict[str, object]:
    """Arguments of ``plan_layout``."""
    ep = draw(st.sampled_from((1, 2, 3, 4, 8, 16, 64)).filter(lambda n: n <= most_ranks))
    return {
        "specs": [draw(_spec(number)) for number in range(draw(st.integers(1, 16)))],
        "edp": draw(st.integers(1, min(12, most_ranks // ep)) | st.integers(1, most_ranks // ep)),
        "ep": ep,
        "dense": draw(st.sampled_from(("auto", "flat", "aligned"))),
        "bucket_elements": draw(st.sampled_from((1, 20, 100, 10_000))),
    }


def layouts(most_ranks: int = 4096) -> st.SearchStrategy[Layout]:
    return stages(most_ranks).map(lambda case: plan_layout(**case))  # type: ignore[arg-type]


@cache
def k2_layout(stage: int, edp: int) -> Layout:
    """Of one of K2's 16 pipeline stages, 16 ranks an expert-parallel group."""
    model = compose(["model=k2"]).model
    layers = stage_layers(model.num_hidden_layers, K2_PP)[stage]
    return plan_layout(stage_specs(model, layers, K2_EP), edp, K2_EP)


def lent(layout: Layout) -> Counter[tuple[int, int]]:
    """(from, to), dp ranks, of every expert matrix that is not its holder's."""
    found: Counter[tuple[int, int]] = Counter()
    for bucket in layout.buckets:
        if bucket.group == "edp" and bucket.kind == "aligned":
            for ep_index, owners in enumerate(bucket.owners):
                for matrix, owner in zip(bucket.matrices, owners, strict=True):
                    holder = matrix.offset // bucket.shard * layout.ep + ep_index
                    if owner != holder:
                        found[holder, owner] += 1
    return found
