"""One command a claim: each prints a ratio against a named peer, measured in one run."""
