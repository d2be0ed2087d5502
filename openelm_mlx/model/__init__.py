"""The model: its configuration, the decoder, and the caches of keys and values.

Arrays go in and come out. What a prompt is, how tokens are drawn and which requests run is the
engine's business, and nothing here imports it.
"""
