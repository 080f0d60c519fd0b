"""What a rank says when another one does not answer."""


class PeerError(RuntimeError):
    """A peer failed or did not answer in time; the run cannot go on (exit code 4)."""
