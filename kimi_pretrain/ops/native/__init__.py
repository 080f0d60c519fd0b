"""The library of csrc/: how it is loaded, and its ops as functions."""
