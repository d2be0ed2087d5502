"""Caches together with the tokens they hold: in memory between turns, in a file between days."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from openelm_mlx.cache import KVCache, make_caches
from openelm_mlx.config import OpenELMConfig, layer_shapes
from openelm_mlx.errors import CacheError, reason
from openelm_mlx.files import name_for_mlx, replacing
from openelm_mlx.kv import CacheKind, Window
from openelm_mlx.tokenizer import StreamingDecoder, Tokenizer

if TYPE_CHECKING:
    from openelm_mlx.loading import Engine

FORMAT = "openelm-mlx prompt cache 3"


class PromptCache:
    """One cache a layer and the tokens they hold, so that a next prompt prefills only what is new."""

    def __init__(self, layers: list[KVCache], tokens: list[int] | None = None) -> None:
        self.layers = layers
        self.tokens = [] if tokens is None else tokens

    @classmethod
    def for_config(cls, config: OpenELMConfig, kind: CacheKind | None = None) -> PromptCache:
        return cls(make_caches(config, kind))

    @property
    def kind(self) -> CacheKind:
        return self.layers[0].kind

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def reuse(self, prompt: list[int]) -> int:
        """Keep the longest common prefix with `prompt`, but never all of it: one token must be run for its logits.

        held    [1, 5, 9, 4, 2]
        prompt  [1, 5, 9, 7]      -> keeps 3, forgets 2, returns 3

        A window that has dropped what it would have to return to starts anew: returns 0.
        """
        common = min(common_prefix(self.tokens, prompt[:-1]), self._held())
        if all(layer.can_trim(layer.offset - common) for layer in self.layers):
            for layer in self.layers:
                layer.trim(layer.offset - common)
        else:
            common = 0
            for layer in self.layers:
                layer.clear()
        del self.tokens[common:]
        return common

    def _held(self) -> int:
        """Tokens that every layer holds: after an interrupt amid a pass some are ahead, or have no arrays."""
        return min(layer.offset if layer.arrays else 0 for layer in self.layers)

    def hold(self, tokens: list[int]) -> None:
        """Say which tokens were fed, after generation. What the caches hold beyond them is forgotten, and of
        `tokens` what they do not hold."""
        fed = min(len(tokens), self._held())
        self.tokens[:] = tokens[:fed]
        for layer in self.layers:
            layer.settle(fed)

    def save(self, path: str | Path, engine: Engine) -> None:
        """Write tokens, keys and values to a safetensors file with the fingerprint of `engine`; all or nothing.

        Raises `CacheError` for an empty cache and for a path that cannot be written.
        """
        if not self.tokens:
            raise CacheError("the cache is empty; there is nothing to save")
        used = self.layers[0].offset if not isinstance(self.kind.layout, Window) else self.layers[0].capacity
        arrays = {
            f"{number}.{part}": mx.contiguous(array[..., :used, :])
            for number, layer in enumerate(self.layers)
            for part, array in enumerate(layer.arrays)
        }
        about = {
            "format": FORMAT,
            "kind": str(self.kind),
            "fingerprint": fingerprint(engine),
            "offset": str(self.layers[0].offset),
            "written": str(self.layers[0].written),
            "tokens": json.dumps(self.tokens),
        }
        try:
            with replacing(path, suffix=".safetensors") as new:
                mx.save_safetensors(name_for_mlx(new), arrays, about)
        except OSError as error:
            raise CacheError(f"{path} cannot be written: {error.strerror}") from None
        except RuntimeError as error:  # MLX's
            raise CacheError(f"{path} cannot be written: {error}") from None

    @classmethod
    def load(cls, path: str | Path, engine: Engine, kind: CacheKind | None = None) -> PromptCache:
        """Load a saved cache.

        Raises `CacheError` where it was made with other weights, another tokenizer or another kind
        of cache, and where it is damaged.
        """
        kind = kind or CacheKind()
        try:
            loaded: Any = mx.load(name_for_mlx(path), format="safetensors", return_metadata=True)
        except (OSError, RuntimeError, ValueError) as error:
            raise CacheError(
                f"{path} is no saved cache ({error}); give another file, or move it away"
            ) from None
        arrays, about = loaded
        if about.get("format") != FORMAT:
            raise CacheError(
                f"{path} is no saved cache of this version: its format is {about.get('format')!r}, not {FORMAT!r}. "
                "Give another file, or move it away"
            )
        if about.get("fingerprint") != fingerprint(engine):
            raise CacheError(
                f"{path} was made with other weights or another tokenizer than {engine.name}'s; "
                "delete it, or use the model it was made with"
            )
        if about.get("kind") != str(kind):
            raise CacheError(f"{path} holds {about.get('kind')}; asked for are {kind}. Give the same options")
        cache = cls.for_config(engine.config, kind)
        try:
            cache._fill(arrays, about, engine)
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise CacheError(f"{path} is damaged: {reason(error)}") from None
        return cache

    def _fill(self, arrays: dict[str, mx.array], about: dict[str, Any], engine: Engine) -> None:
        tokens, offset, written = json.loads(about["tokens"]), int(about["offset"]), int(about["written"])
        if not isinstance(tokens, list) or not 0 < len(tokens) == offset:
            raise ValueError(f"{offset} positions for {len(tokens)} tokens")
        if any(type(token) is not int or not 0 <= token < engine.config.vocab_size for token in tokens):
            raise ValueError("tokens outside the vocabulary")
        layout = self.kind.layout
        slots = layout.capacity if isinstance(layout, Window) else offset
        for number, (layer, shape) in enumerate(zip(self.layers, layer_shapes(engine.config), strict=True)):
            like = self.kind.store.pack(mx.zeros((1, 2 * shape.kv_heads, slots, engine.config.head_dim)))
            stored = [arrays[f"{number}.{part}"] for part in range(len(like))]
            if wrong := [a.shape for a, b in zip(stored, like, strict=True) if a.shape != b.shape]:
                raise ValueError(f"keys and values of layer {number} have the shape {wrong[0]}")
            layer.reserve(offset, like=stored)
            for buffer, saved in zip(layer.arrays, stored, strict=True):
                buffer[..., :slots, :] = saved
            layer.settle(offset, written)
        self.tokens[:] = tokens
        mx.eval([layer.arrays for layer in self.layers])


def common_prefix(held: Sequence[int], wanted: Sequence[int]) -> int:
    for count, (ours, theirs) in enumerate(zip(held, wanted, strict=False)):
        if ours != theirs:
            return count
    return min(len(held), len(wanted))


def continued_ids(tokenizer: Tokenizer, held: Sequence[int], text: str) -> list[int]:
    """Ids of `text` that begin with as many of `held` as stand for its beginning; the rest is encoded as what follows.

    held    <s> Once upon a ti me                (as they were generated, where "time" is a piece, too)
    text    Once upon a time there was
    ids     <s> Once upon a ti me | there was

    Where `held` goes on otherwise than `text`, the ids are kept up to the last word that both share.
    """
    if not held or held[0] != tokenizer.bos_id:
        return tokenizer.encode(text)
    ours = list(takewhile(lambda token: token < tokenizer.vocab_size and tokenizer.piece_bytes(token), held[1:]))
    decoder, place, kept, seam = StreamingDecoder(tokenizer), 0, 0, 0  # `ours` ends at a control token: texts have none
    for count, token in enumerate(ours, 1):
        shown = decoder.push(token)
        if not text.startswith(shown, place):
            break
        place += len(shown)
        if not decoder.pending and not text[place : place + 1].strip():  # a space follows, or nothing
            kept, seam = count, place
    else:
        shown = decoder.flush()
        if text.startswith(shown, place):
            kept, seam = len(ours), place + len(shown)
    return [*held[: kept + 1], *tokenizer.encode(text[seam:], bos=False, continued=kept > 0)]


def fingerprint(engine: Engine) -> str:
    """sha256 over configuration, tokenizer and a checksum of every weight: what keys and values depend on.

    The checksum of a tensor is the sum of its words (of its element's width) and their sum weighted by place, modulo 2^32.
    """
    from openelm_mlx.loading import parameters

    digest = hashlib.sha256(json.dumps(engine.config.to_hf_dict(), sort_keys=True, default=str).encode())
    digest.update(repr(sorted((engine.quantization or {}).items(), key=str)).encode())
    digest.update(engine.tokenizer.fingerprint.encode())
    for name, array in sorted(parameters(engine.model).items()):
        words = array.reshape(-1).view({1: mx.uint8, 2: mx.uint16}.get(array.itemsize, mx.uint32)).astype(mx.uint32)
        places = mx.arange(words.size, dtype=mx.uint32) % 65521 + 1
        sums: Any = mx.stack([words.sum(), (words * places).sum()]).tolist()
        digest.update(f"{name} {array.dtype} {array.shape} {sums}".encode())
    return digest.hexdigest()
