"""A rank of the real program, run without memory and without peers."""
