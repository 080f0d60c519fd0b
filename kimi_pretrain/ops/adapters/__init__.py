"""Libraries that run an operation faster on a GPU, behind the signatures of ``ops``.

None is required and none is imported before it is asked for. Compiled, not run: there was no GPU;
their calls are held against plain torch through stand-ins of the libraries' functions.
"""
