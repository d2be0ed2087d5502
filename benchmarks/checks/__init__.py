"""Randomized checks of the engine: random requests are run in every way and judged.

`trials` draws requests, `judge` weighs tokens that differ by a pass of its own in numpy, and
`soak` keeps an engine busy for hours. Nothing here times anything for a comparison of engines.
"""
