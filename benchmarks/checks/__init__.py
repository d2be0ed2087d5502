"""Randomized checks of the engine: random requests, run in every way, judged by an independent
reference.

`trials` draws requests, `reference` is the model in numpy, `judge` weighs tokens that differ, and
`soak` keeps an engine busy for hours. Nothing here times anything for a result.
"""
