"""Quantization: which spec every matrix gets, and how its weights are rounded to it.

Here lives what chooses a plan, measures losses and learns rounding, on weights in float32. Reading
sources, writing targets and the specs themselves (openelm_mlx.quantization) live elsewhere.
"""
