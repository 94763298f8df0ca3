"""Data sets as memory-mapped arrays."""
