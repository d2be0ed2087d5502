"""Benchmarks: speed, memory and loss of this engine and of others, and how far they are from what a
chip can do.

timing.py    one run of one engine: the seam between the harness and every engine that it times
ours.py      this engine behind that seam; peers/ holds the others
harness.py   trials, interleaved; suites.py says of what
document.py  the result document; tables.py shows it, compare.py sets two of them against each other
"""
