"""Kernels of our own for GPUs, each beside its plain twin of MLX's operations.

A kernel saves launches, which are much of a small model's token (docs/performance.md). Those listed
in docs/architecture.md are here, a file each with the kernel, the function that the model calls and
the twin which that function falls back to; the draw's is chosen in engine/sampling.py.

`kernel` has the form of a kernel, launches it, and decides which are in use; `cuda` runs the same
sources on NVIDIA's GPUs. On first use on a GPU, `self_check` has each file's `check()` compare the
two there: it takes no arguments, and returns how they differ on small inputs
(`self_check.difference` says it), "" if they do not.
"""
