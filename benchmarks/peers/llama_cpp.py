"""llama.cpp behind the `Session` of timing.py, on a GGUF that our converter writes from the model folder."""

from __future__ import annotations
