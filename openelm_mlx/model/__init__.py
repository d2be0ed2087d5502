"""The model: its configuration, the decoder, adapters, and the caches of keys and values.

Arrays go in and come out; what files say of them is read here, for loading and for converting.
What a prompt is, how tokens are drawn and which requests run is the engine's business, and nothing
here imports it.
"""
