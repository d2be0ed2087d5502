"""Result documents: their schema, how sure their figures are, and how they are shown and compared.

What was measured is read from documents only, so that a file of another machine is treated as one of
this machine. Nothing here may measure, load a model or import MLX; pictures alone need matplotlib.
"""
