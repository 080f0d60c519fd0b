"""What a run will need, from shapes alone: no torch, no process, no allocation."""
