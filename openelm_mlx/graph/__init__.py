"""The graph that MLX evaluates, as plain data.

`trace` asks MLX for the primitives of a function without computing any, `layout` follows where
elements lie. What a graph is asked for (kernels of a token, memory of a training step) is the
business of the rooms above.
"""
