"""What hardware allows: chips with their bandwidths, and the bytes that a token must read.

Nothing here measures or runs a model; everything follows from tables and configurations.
"""
