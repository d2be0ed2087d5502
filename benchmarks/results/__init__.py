"""Result documents: their schema, how sure their figures are, how they are shown and compared.

All is read from documents, so that those of another machine are shown as those of this one are.
Nothing here may measure, load a model or import MLX; only pictures need matplotlib.
"""

OURS = "openelm-mlx"  # this engine, as rows name it
# of a run: they find a slowdown of 10 % in 95 of 100 runs if processes differ by 2 %; 3 do not
PROCESSES = 5
