"""The engine: a model's name becomes an `Engine`, and a prompt becomes events.

Loading, tokenizer and chat format, options, sampling, the scheduler and its step, drafts and the
prefix cache, and the files of adapters live here; generation.py is the map. It knows no command
line and prints nothing but that a source is converted; for this, and for an adapter inside a
checkpoint, it imports `openelm_mlx.convert`.
"""
