"""Kernels of our own for GPUs, each beside its plain twin of MLX's operations.

A kernel saves launches, which are much of a small model's token (docs/performance.md). Each file
has one kernel, the function that the model calls, and the twin which that function falls back to:
the same values by operations of MLX. `kernel` runs them and decides which are in use. On first use
on a GPU, `self_check` has each file's `check()` compare the two there: it takes no arguments, and
returns how they differ on small inputs (`self_check.difference` says it), "" if they do not.
"""
