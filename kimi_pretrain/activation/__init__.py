"""What a layer keeps for its backward: kept, computed again, in FP8, in the host's memory."""
