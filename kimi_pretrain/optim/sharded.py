"""MuonClip with its state sharded over the replicas of every parameter (ZeRO-1, design 4.5).

Each rank keeps masters and moments of its shards only, updates them, and sends the rounded
result to the other replicas. One class for any number of ranks: with one, every shard is
whole and nothing travels.

One step, after the gradients' reduction (``buffers``) and their global norm:

1. Matrices that lie in pieces: momentum on the pieces, which set out for their owners.
2. Meanwhile whole matrices are updated where they lie, and AdamW's shards.
3. Owners orthogonalise what arrived and send it back; the pieces' masters take it.
4. QK-Clip on the masters, the rounded shards, and their all-gather, bucket by bucket as soon
   as each is done.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from kimi_pretrain.optim.adamw import adamw_
from kimi_pretrain.optim.buckets import Layout
from kimi_pretrain.optim.buffers import ShardedBuffers
from kimi_pretrain.optim.piece import Piece, named_ranges
from kimi_pretrain.optim.qk_clip import (
    Clip,
    Observation,
    attention_layers,
    require_fitting,
)
from kimi_pretrain.optim.settings import Settings
from kimi_pretrain.optim.shard import Shard
from kimi_pretrain.parallel.collectives import Group


class ShardedMuonClip:
    """The optimizer of a training run: Muon, AdamW and QK-Clip on this rank's shards."""

    def __init__(
        self,
        named_parameters: Mapping[str, nn.Parameter],
        layout: Layout,
        groups: Mapping[str, Group],
        settings: Settings,
        first_expert: int = 0,
    ) -> None:
        """Take over the parameters, whose memory moves into flat buffers.

        Args:
            named_parameters: as in the layout's specs.
            layout: of this rank's pipeline stage.
            groups: "edp", "dp", and "everyone": over whose shards a norm is summed.
            settings: hyperparameters.
            first_expert: index of the first routed expert that this rank holds.
        """
        self.settings = settings
        self.everyone = groups["everyone"]
        self.first_expert = first_expert
        self.buffers = ShardedBuffers(named_parameters, layout, groups)
        self.shards = [
            Shard(buffers, groups["dp"], layout.ep, settings) for buffers in self.buffers.buckets
        ]
        self.steps = 0
        self.last_clipped_step: int | None = None
        self._rows = {
            name: shape[0]
            for buffers in self.buffers.buckets
            for name, shape, _, _ in named_ranges(buffers.bucket, first_expert)
        }
        self._observed: Observation | None = None
        self._clip = Clip.of_nothing()

    # --- gradients ------------------------------------------------------------------------

    def norm(self) -> Tensor:
        """The L2 norm of the whole model's gradient, float64, the same on every rank.

        Every element counts once: a rank adds its shards, and shards do not overlap.
        """
        total = sum(
            (shard.squared_norm() for shard in self.shards),
            torch.zeros((), dtype=torch.float64, device=self.everyone.device),
        )
        self.everyone.all_reduce_sum(total).wait()
        return total.sqrt()

    def clip_gradients(self, norm: float, limit: float | None) -> None:
        """Scale this rank's sums so that a global ``norm`` above ``limit`` becomes ``limit``."""
        if limit is not None and norm > limit:
            for shard in self.shards:
                shard.buffers.gradient_shard.mul_(limit / norm)

    def nonfinite(self) -> list[str]:
        """Hugging Face names whose gradient from this rank is not finite."""
        return self.buffers.nonfinite(self.first_expert)

    # --- the step -------------------------------------------------------------------------

    def observe_max_logits(self, max_logits: Tensor, exact: Tensor | None = None) -> None:
        """Hand the next ``step`` the largest attention logits of the global batch.

        Arguments and errors as of ``MuonClip.observe_max_logits``.
        """
        if self.settings.qk_clip_threshold is not None:
            layers = attention_layers(self._rows)
            require_fitting(max_logits, layers, self._rows, self.settings.qk_head_dims)
        self._observed = Observation(max_logits, exact)

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update the shards from their gradients and start the parameters' all-gather.

        Raises:
            ValueError: a maximum above tau that is only a bound; nothing is updated then.
        """
        self._clip = Clip.of(self._observed, self.settings.qk_clip_threshold)
        self._observed = None
        factors = self._clip_factors()
        self.steps += 1
        if self._clip.heads:
            self.last_clipped_step = self.steps
        travelling = [shard for shard in self.shards if shard.travels]
        for shard in travelling:
            shard.send_updates()
        # Buckets lie in the order of backward; the next forward waits for the last one first.
        for shard in reversed(self.shards):
            if not shard.travels:
                self._update(shard, lr, factors)
        for shard in travelling:
            shard.orthogonalize()
        for shard in reversed(travelling):
            self._update(shard, lr, factors)

    @property
    def qk_clip_metrics(self) -> dict[str, float | int | None]:
        """What the last step clipped, as ``MuonClip.qk_clip_metrics``."""
        return {
            "max_logit": self._clip.max_logit,
            "number_clipped": self._clip.heads,
            "share_clipped": self._clip.share,
            "last_step": self.last_clipped_step,
        }

    def _update(self, shard: Shard, lr: float, factors: Mapping[str, Tensor]) -> None:
        if shard.bucket.kind == "adamw":
            settings = self.settings
            adamw_(
                [shard.master],
                [shard.buffers.gradient_shard],
                [shard.state["exp_avg"]],
                [shard.state["exp_avg_sq"]],
                step=self.steps,
                lr=lr,
                betas=settings.betas,
                eps=settings.eps,
                weight_decay=settings.weight_decay,
            )
        else:
            shard.update_matrices(lr)
            for named in named_ranges(shard.bucket, self.first_expert):
                if named.name in factors:
                    shard.scale_rows(named, factors[named.name])
        shard.round_master()
        shard.buffers.gather()

    def _clip_factors(self) -> dict[str, Tensor]:
        """Row factors of every projection with a head to clip, by name."""
        found: dict[str, Tensor] = {}
        if self._clip.heads:
            dims = self.settings.qk_head_dims
            assert dims is not None
            for layer in attention_layers(self._rows):
                factors = self._clip.factors(layer.layer, dims)
                if factors is not None:
                    found[layer.q], found[layer.kv] = factors
        return found

    # --- state ----------------------------------------------------------------------------

    def pieces(self) -> Iterator[Piece]:
        """This rank's share of the training state, as views that may be written into."""
        for shard in self.shards:
            for kind, values in shard.named_state():
                yield from self._pieces_of(shard, kind, values)

    def gradient_pieces(self) -> Iterator[Piece]:
        """This rank's share of the summed gradients, from ``reduced`` to the next ``zero``."""
        for shard in self.shards:
            yield from self._pieces_of(shard, "gradient", shard.buffers.gradient_shard)

    def _pieces_of(self, shard: Shard, kind: str, values: Tensor) -> Iterator[Piece]:
        own = shard.buffers.own
        for name, shape, start, stop in named_ranges(shard.bucket, self.first_expert):
            low, high = max(start, own.start), min(stop, own.stop)
            if low < high:
                here = values[low - own.start : high - own.start]
                yield Piece(kind, name, shape, low - start, here)

    @torch.no_grad()
    def publish(self) -> None:
        """Round the masters into the parameters of all replicas; after a load. Collective."""
        for shard in self.shards:
            shard.round_master()
            shard.buffers.gather()
        self.buffers.gathered()
