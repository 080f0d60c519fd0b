"""One exit code for a run from those of its ranks, or of its nodes."""

import signal
from collections.abc import Iterable, Mapping

from kimi_pretrain.config import exit_codes

# Most ranks end because another one has. Causes come before what they cause: a defect, a
# refusal or a guard, then a rank that was killed, and only then the loss of a peer.
_CAUSES = (exit_codes.DEFECT, exit_codes.BAD_INPUT, exit_codes.GUARD)
_CONSEQUENCES = (exit_codes.PEER, exit_codes.SIGNAL)


def verdict(codes: Mapping[int, int]) -> tuple[int, str]:
    """The exit code from those of the ranks that failed, and a line or nothing.

    Args:
        codes: rank -> its exit code, negative for the signal that killed it.
    """
    spoken = {code for code in codes.values() if code > 0}
    ended = {rank: signal.Signals(-code) for rank, code in codes.items() if code < 0}
    killed = {rank: number for rank, number in ended.items() if number != signal.SIGTERM}
    causes = [code for code in _CAUSES if code in spoken]
    if killed and not causes:
        rank = min(killed)
        hint = " (out of memory?)" if killed[rank] == signal.SIGKILL else ""
        others = f", and {len(killed) - 1} more" if len(killed) > 1 else ""
        line = f"rank {rank} was killed by {killed[rank].name}{hint}{others}; the run has ended"
        return exit_codes.PEER, line
    if not spoken:  # a signal before the ranks could stop in order
        return exit_codes.SIGNALLED + signal.SIGTERM, ""
    return worst(spoken), ""


def worst(codes: Iterable[int]) -> int:
    """Of several exit codes the one that says why; 0 where all are."""
    failed = {code for code in codes if code != exit_codes.DONE}
    known = [code for code in (*_CAUSES, *_CONSEQUENCES) if code in failed]
    return known[0] if known else max(failed, default=exit_codes.DONE)
