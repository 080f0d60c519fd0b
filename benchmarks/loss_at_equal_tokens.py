"""Held-out loss after equal tokens against transformers and torch.optim.

    python -m benchmarks.loss_at_equal_tokens [--steps N] [--precision fp32]

Both sides start from the same weights and read the same batches of the default corpus with
the same learning rates, weight decay and clipping, by default to the end of the default run's
schedule, decay included; MuonClip here, torch.optim.Muon (match_rms_adamw) with
torch.optim.AdamW there. Ours also balances its router (bias update and auxiliary loss), as K2
does and the peer cannot. Prints both losses and their ratio.
"""

import argparse

import torch

from benchmarks.report_lines import print_header
from benchmarks.transformers_peer import PeerOptimizer, load_peer
from kimi_pretrain.config import compose
from kimi_pretrain.data.batches import Batch, TrainStream, heldout_windows
from kimi_pretrain.data.corpus import ensure
from kimi_pretrain.model.build import from_config
from kimi_pretrain.ops.precision import resolve
from kimi_pretrain.optim.lr import learning_rate, total_steps
from kimi_pretrain.parallel.world import open_world
from kimi_pretrain.pipeline.forward import ForwardPipeline
from kimi_pretrain.train.evaluate import evaluate
from kimi_pretrain.train.step import TrainStep


def peer_loss(peer: torch.nn.Module, batch: Batch) -> torch.Tensor:
    """Mean cross entropy of the peer over the labels of `batch`."""
    logits = peer(input_ids=torch.from_numpy(batch.tokens)).logits.float()
    labels = torch.from_numpy(batch.labels)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="k2_nano")
    parser.add_argument("--steps", type=int, default=None, help="fewer than the default run's")
    parser.add_argument("--precision", default="fp32")
    arguments = parser.parse_args()
    print_header("held-out loss at equal tokens", ["torch", "transformers"])
    config = compose(
        [
            f"model={arguments.model}",
            f"precision={arguments.precision}",
            f"schedule.max_steps={'null' if arguments.steps is None else arguments.steps}",
            "data.document_mask=false",
            "run_dir=unused",
        ]
    )
    data = ensure(config.data, print)
    stream = TrainStream(data, config.data, config.seed)
    heldout = list(heldout_windows(data, config.data, config.schedule.eval_sequences, 8))
    dtype = resolve(config.precision)
    model = from_config(config.model, dtype=dtype)
    peer = load_peer(model, dtype, experts="eager", attention="sdpa")
    ours = TrainStep.open(config, dtype, open_world(config.parallel))  # the same weights
    theirs = PeerOptimizer(peer, config.optimizer.lr, config.optimizer.weight_decay)
    size, micro = config.schedule.global_batch_size, config.schedule.micro_batch_size
    tokens_per_step = size * config.data.sequence_length
    steps = total_steps(config.schedule, tokens_per_step)
    for step in range(steps):
        batch = stream.read(step * size, size)
        rate = learning_rate(config.schedule, config.optimizer.lr, tokens_per_step, step)
        result = ours.run(step + 1, batch, rate)
        total = 0.0
        for first in range(0, size, micro):
            rows = slice(first, first + micro)
            part = Batch(batch.tokens[rows], batch.labels[rows], None)
            loss = peer_loss(peer, part) * micro / size
            loss.backward()
            total += float(loss.detach())
        if config.optimizer.grad_clip is not None:
            torch.nn.utils.clip_grad_norm_(peer.parameters(), config.optimizer.grad_clip)
        theirs.set_lr(rate)
        theirs.step()
        theirs.zero_grad()
        if step % 10 == 0:
            print(f"step {step + 1}: train loss ours {result.loss:.4f}, peer {total:.4f}")
    lengths = data.tokenizer.byte_lengths()
    alone = ours.world.dp
    forward = ForwardPipeline(ours.model, ours.dispatcher, ours.world.pp)
    ours_heldout = evaluate(forward, heldout, lengths, None, alone, alone).loss
    with torch.no_grad():
        weights = [int((batch.labels >= 0).sum()) for _, batch in heldout]
        losses = [float(peer_loss(peer, batch)) for _, batch in heldout]
    peer_heldout = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
    print(f"tokens           {steps * tokens_per_step:,}")
    print(f"ours             {ours_heldout:.5f} nats a token, held out")
    print(f"transformers     {peer_heldout:.5f}")
    print(f"ratio            {ours_heldout / peer_heldout:.5f}")


if __name__ == "__main__":
    main()
