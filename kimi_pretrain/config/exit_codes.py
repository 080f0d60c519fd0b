"""Exit codes of the program (docs/exit-codes.md)."""

DONE = 0
DEFECT = 1  # a traceback was printed, or a dry run differs from its plan
BAD_INPUT = 2
GUARD = 3  # a number was not finite; weights are those before the step
PEER = 4  # another rank failed or did not answer in time
SIGNAL = 75  # stopped by a signal after a checkpoint: start again to go on
SIGNALLED = 128  # plus a signal's number: it came before there was anything to save
