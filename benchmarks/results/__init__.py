"""Result documents: their schema, how sure their figures are, how they are shown and compared.

All is read from documents, so that those of another machine are shown as those of this one are.
Nothing here may measure, load a model or import MLX; only pictures need matplotlib.
"""
