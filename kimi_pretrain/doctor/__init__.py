"""Preflight: whether these hosts, GPUs, links and disks are fit for a run, before it is started.

What one host says of itself is looked up once a host (``host``); probes run on every rank at
once, and whoever is slow beside the others is named with its host (``probes``, ``outliers``).
"""
