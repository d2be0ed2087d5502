"""Benchmarks: speed, memory and loss of this engine and of others, and how far they are from what a
chip can do.

`measure` runs and `peers` are the engines that it runs beside this one; `results` keeps, compares
and shows what was found; `hardware` says what a chip can do. `ledger` counts what a token costs
without running it, `checks` tries the engine at random, `doctor` asks whether a device computes
correctly and what its work costs. `scripts` time what the command does not, and are not installed.
Whoever only runs a model does not need this room: the engine and the converter import nothing from
it.
"""
