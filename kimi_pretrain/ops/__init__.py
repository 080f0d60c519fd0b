"""Numerical kernels: pure functions on tensors, below any notion of a layer or a rank."""
