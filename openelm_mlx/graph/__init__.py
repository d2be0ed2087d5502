"""The graph that MLX evaluates, as plain data.

`trace` asks MLX for the primitives of a function without computing any, `gradients` does so for
functions with gradients of their own, `layout` follows where elements lie, and `memory` which
arrays live at a time. What a graph is asked for (kernels of a token, memory of a training step) is
the business of the rooms above.
"""
