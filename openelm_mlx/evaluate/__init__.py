"""Scores say how good a model's predictions are, and how far they are from another model's.

Here lives what scores text and compares distributions, for anything that gives logits. What reads
files, converts or measures time does not: those rooms call this one.
"""
