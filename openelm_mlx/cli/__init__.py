"""The command line: one small file a command, flags made from the option dataclasses.

It reads arguments and shows results, and asks the other rooms for everything that computes.
Nothing here loads MLX before a command runs, and no other room imports from here.
"""
