"""Randomized checks of the engine: random requests are run in every way and judged.

`trials` draws requests, `reference` is the model in numpy, `judge` weighs tokens that differ, and
`soak` keeps an engine busy for hours. Nothing here times anything for a comparison of engines.
"""
