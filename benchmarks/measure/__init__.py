"""Measuring: options become cases, cases become trials, trials become the rows of a document.

Models, trials and the facts of the machine belong here; what is done with a finished document
belongs in `results`, which may not import this room.
"""
