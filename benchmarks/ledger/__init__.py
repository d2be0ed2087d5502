"""The ledger counts what one decoded token costs on Metal: kernels, bytes and the host's time.

It works on graphs that MLX traces, runs nothing on a GPU and needs no weights. It imports the
engine and `hardware`, and nothing else of the benchmarks.
"""
