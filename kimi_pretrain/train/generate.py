"""A short sample of what the model has learnt, for a person to read."""

import torch
from torch import Tensor

from kimi_pretrain.model.causal_lm import CausalLM
from kimi_pretrain.parallel.collectives import Group


@torch.no_grad()
def generate(
    model: CausalLM,
    prompt: list[int],
    count: int,
    *,
    context: int,
    vocabulary: int,
    temperature: float = 0.8,
    top_k: int = 40,
    stop: int | None = None,
    seed: int = 0,
    ranks: Group | None = None,
) -> list[int]:
    """`count` ids below `vocabulary` that continue `prompt` (fewer if the id `stop` comes up).

    Each token is drawn from the `top_k` likeliest at `temperature`, with a generator of
    its own, so that a sample never disturbs the run's random state. The whole context (at
    most `context` tokens) is run again for each token: short samples need no cache. Where
    experts lie on several `ranks`, all of them come here and follow the first one's draw.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(count):
        window = torch.tensor([ids[-context:]], device=device)  # [1, context]
        logits = model(window)[0, -1, :vocabulary].float().cpu()  # rows past it have no text
        likeliest, indices = logits.topk(min(top_k, vocabulary))  # [top_k]
        drawn = int(indices[_draw(likeliest / temperature, generator)])
        if ranks is not None:
            told = torch.tensor([drawn], device=ranks.device)
            ranks.broadcast(told).wait()
            drawn = int(told)
        if drawn == stop:
            break
        ids.append(drawn)
    return ids[len(prompt) :]


def _draw(logits: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(torch.softmax(logits, dim=0), 1, generator=generator))
