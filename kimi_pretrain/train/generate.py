"""A short sample of what the model has learnt, for a person to read."""

import torch
from torch import Tensor

from kimi_pretrain.model.microbatch import DeviceBatch
from kimi_pretrain.parallel.collectives import Group
from kimi_pretrain.pipeline.forward import ForwardPipeline


def generate(
    forward: ForwardPipeline,
    prompt: list[int],
    count: int,
    *,
    context: int,
    vocabulary: int,
    ranks: Group,
    speaks: bool = True,
    temperature: float = 0.8,
    top_k: int = 40,
    stop: int | None = None,
    seed: int = 0,
) -> list[int]:
    """`count` ids below `vocabulary` that continue `prompt` (fewer if the id `stop` comes up).

    Each token is drawn from the `top_k` likeliest at `temperature`, with a generator of
    its own, so that a sample never disturbs the run's random state. The whole context (at
    most `context` tokens) is run again for each token: short samples need no cache. All
    `ranks` come here and follow the draw of the one that has the logits and `speaks`.
    """
    device = forward.model.device
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(count):
        window = torch.tensor([ids[-context:]], device=device)  # [1, context]
        drawn = torch.full((1,), -1, device=device)

        def draw(_: int, hidden: Tensor, drawn: Tensor = drawn) -> None:
            head = forward.model.chunks[max(forward.model.chunks)].lm_head
            logits = head(hidden[0, -1])[:vocabulary].float().cpu()  # rows past it have no text
            likeliest, indices = logits.topk(min(top_k, vocabulary))  # [top_k]
            if speaks:
                drawn[0] = indices[_draw(likeliest / temperature, generator)]

        forward.run([DeviceBatch(window, window, None)], None, draw)
        ranks.all_reduce_max(drawn).wait()
        if int(drawn) == stop:
            break
        ids.append(int(drawn))
    return ids[len(prompt) :]


def _draw(logits: Tensor, generator: torch.Generator) -> int:
    return int(torch.multinomial(torch.softmax(logits, dim=0), 1, generator=generator))
