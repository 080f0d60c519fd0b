"""Who is updated by Muon. No torch import: a planner asks, too."""

import re

_NEVER_MUON = re.compile(r"(?:^|\.)(?:embed_tokens|lm_head)(?:\.|$)")


def uses_muon(name: str, ndim: int) -> bool:
    """Whether Muon (else AdamW) updates a parameter of this name and number of dimensions.

    Muon takes matrices and stacks of them, router weights too; AdamW takes the embedding,
    the head and everything one-dimensional (arXiv 2502.16982, section 2.2).
    """
    return ndim >= 2 and _NEVER_MUON.search(name) is None
