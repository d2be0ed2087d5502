"""Checkpoints of a run: weights, optimizer, and where it is."""
