"""The training loop: one run from its configuration to its report."""
