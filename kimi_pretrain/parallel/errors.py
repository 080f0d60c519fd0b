"""What a rank says when another one does not answer."""

from collections.abc import Sequence


class PeerError(RuntimeError):
    """A peer failed or did not answer in time; the run cannot go on (exit code 4)."""


class FirstRankError(PeerError):
    """Rank 0, which speaks for all, is the one that did not answer: everyone says so."""


def named(ranks: Sequence[int]) -> str:
    """``rank 3``, ``ranks 1, 2, 5``, or the first few and how many there are."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:8]))
    return f"ranks {shown}" + (f", ... ({len(ranks)} in all)" if len(ranks) > 8 else "")


def first_line(error: BaseException) -> str:
    """What an error of torch.distributed says before its C++ traceback."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
