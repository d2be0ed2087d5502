"""The prefix cache: sequences that were run, and their keys and values, in memory and files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm_mlx.device import mx
from openelm_mlx.dtypes import name_of
from openelm_mlx.engine.options import EngineOptions, check_loaded, with_overrides
from openelm_mlx.engine.threads import device_work
from openelm_mlx.engine.tokenizer import Tokenizer, spelling
from openelm_mlx.errors import CacheError, reason
from openelm_mlx.fields import check_count
from openelm_mlx.files import name_for_mlx, replacing
from openelm_mlx.model.cache import KVCache
from openelm_mlx.model.cache_kinds import CacheKind, Window
from openelm_mlx.model.config import layer_shapes
from openelm_mlx.model.decoder import parameters

if TYPE_CHECKING:
    from openelm_mlx.engine.loading import Engine

FORMAT = "openelm-mlx prompt cache 4"
LEAST = 2  # tokens that are worth a copy: <s> alone, which all have, is as soon computed again


@dataclass(frozen=True, eq=False)
class Entry:
    """A sequence, and the cache of exactly its tokens."""

    weights: object
    owner: str
    tokens: list[int]
    cache: KVCache
    nbytes: int

    def serves(self, weights: object, kind: CacheKind, owner: str) -> bool:
        """Return whether it may be used with these weights, this kind of cache, and this owner."""
        return self.weights is weights and self.cache.kind == kind and self.owner == owner

    def covers(self, other: Entry) -> bool:
        """Return whether this can give every beginning that `other` can give."""
        length = len(other.tokens)
        if not other.serves(self.weights, self.cache.kind, self.owner):
            return False
        return self.tokens[:length] == other.tokens and self.cache.can_trim(
            len(self.tokens) - length
        )


class PromptCache:
    """Sequences with their keys and values: the next prompt prefills only its new part.

    A generation takes a cache out and puts it back longer. A cache belongs either to a generation
    or to the store, so no two ever write to the same arrays. An entry is used only with the weights
    that computed it, for its kind of cache, and for its owner: the time of an answer does not tell
    one owner what another has asked. Beyond `max_bytes` the least recently used entries are
    dropped; the latest stays even if it alone takes more.

    Conversations, generations and batches of any threads may share a `PromptCache`. They use it in
    turn; only the garbage collector may interrupt one of its methods to close a generation, which
    adds an entry. Raises `OptionError` if `max_bytes` is not a whole number from 0 up.
    """

    def __init__(self, max_bytes: int = 2**30) -> None:
        check_count("max_bytes", max_bytes)
        self.max_bytes = max_bytes
        self._entries: list[Entry] = []  # the least recently used first

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def tokens(self) -> list[int]:
        """The tokens of the latest entry, [] if there is none."""
        return list(self._entries[-1].tokens) if self._entries else []

    @property
    def nbytes(self) -> int:
        """Bytes of all keys and values."""
        return sum(entry.nbytes for entry in self._entries)

    def clear(self) -> None:
        """Drop every entry."""
        self._entries.clear()

    def take(
        self, weights: object, kind: CacheKind, tokens: Sequence[int], owner: str = ""
    ) -> tuple[KVCache, int] | None:
        """Return a cache with a beginning of `tokens`, and how many of them, or None.

        It is the longest beginning that any entry can give, but never all of `tokens`: one must be
        run for its logits. One token is not worth a copy.

            stored  [1, 5, 9]  [1, 5, 9, 4, 2]
            tokens  [1, 5, 9, 4, 7]             -> a copy of the second entry's first 4
            tokens  [1, 5, 9, 8]                -> the first entry itself, which leaves the store

        `weights` is what `engine.steps.refresh()` returns for the weights in use. A window cannot
        give a beginning whose latest tokens it has overwritten.
        """
        wanted = list(tokens[:-1])
        found = [
            (common, common == len(entry.tokens), place, entry)
            for place, entry in enumerate(self._entries)
            if entry.serves(weights, kind, owner)
            and (common := common_prefix(entry.tokens, wanted))
        ]
        found.sort(key=itemgetter(0, 1, 2), reverse=True)  # of equals one that need not be copied
        for common, entire, _, entry in found:
            if not entire and common < LEAST:
                continue
            cache = entry.cache if entire else entry.cache.prefix(common)
            if cache is not None:
                with suppress(ValueError):  # it may have moved, or gone, since it was found
                    self._entries.remove(entry)
                if not entire:
                    self._entries.append(entry)
                return cache, common
        return None

    def put(self, weights: object, tokens: Sequence[int], cache: KVCache, owner: str = "") -> None:
        """Add the sequence `tokens`, which `cache` has; from now on the cache is the store's.

        Entries that are a beginning of the sequence are dropped if the new one can give them as
        well. Raises `CacheError` if `cache` has more or fewer tokens.
        """
        if cache.offset != len(tokens):
            what = f"the cache has {cache.offset} tokens, but {len(tokens)} were given"
            raise CacheError(f"{what}; give those of the cache")
        if not tokens:
            return
        new = Entry(weights, owner, list(tokens), cache, cache.nbytes)
        self._entries = [old for old in self._entries if not new.covers(old)] + [new]
        self.shrink(self.max_bytes, 1)

    def shrink(self, most: int, least: int = 0) -> None:
        """Drop the least recently used entries beyond `most` bytes, but not the latest `least`."""
        excess = self.nbytes - most
        while excess > 0 and len(self._entries) > least:
            excess -= self._entries.pop(0).nbytes

    def forget(self, weights: object) -> None:
        """Drop what was computed with these weights, which are no longer in use."""
        self._entries = [entry for entry in self._entries if entry.weights is not weights]

    def ids_for(
        self, tokenizer: Tokenizer, text: str, weights: object, kind: CacheKind, owner: str = ""
    ) -> list[int]:
        """Return ids of `text`: those of an entry, as far as it spells the text, and then new ones.

        stored  <s> Once upon a ti me       (as they were drawn, though "time" is a piece, too)
        text    Once upon a time there was
        ids     <s> Once upon a ti me | there was

        Where encoding the text anew reuses as many tokens, the ids are those. Raises `PromptError`
        as `Tokenizer.encode` does.
        """
        tokens = tokenizer.encode(text)
        stored = [entry.tokens for entry in self._entries if entry.serves(weights, kind, owner)]
        plain = max((common_prefix(one, tokens) for one in stored), default=0)
        spelled = ((*continuation(tokenizer, one, text), one) for one in stored)
        kept, place, best = max(spelled, default=(0, 0, []))
        if kept <= plain:
            return tokens
        return [*best[:kept], *tokenizer.encode(text[place:], bos=False, continued=kept > 1)]

    @device_work
    def save(self, path: str | Path, engine: Engine) -> None:
        """Write the latest sequence of `engine` to a safetensors file, completely or not at all.

        The file has its tokens, its keys and values, and the fingerprint of `engine`. Raises
        `CacheError` if there is no such sequence, and for a path that cannot be written.
        """
        check_loaded("engine", engine)
        weights = engine.steps.refresh()
        entry = next((one for one in reversed(self._entries) if one.weights is weights), None)
        if entry is None:
            what = f"the cache has nothing that {engine.name} has run"
            raise CacheError(f"{what}; there is nothing to save")
        cache = entry.cache
        used = cache.capacity if isinstance(cache.kind.layout, Window) else cache.offset
        arrays = {
            f"{number}.{part}": mx.contiguous(array[..., :used, :])
            for number, layer in enumerate(cache.arrays)
            for part, array in enumerate(layer)
        }
        about = {
            "format": FORMAT,
            "kind": str(cache.kind),
            "fingerprint": fingerprint(engine),
            "adapter": named(engine),
            "offset": str(cache.offset),
            "written": str(cache.written),
            "tokens": json.dumps(entry.tokens),
        }
        try:
            with replacing(path, suffix=".safetensors") as new:
                mx.save_safetensors(name_for_mlx(new), arrays, about)
        except OSError as error:
            raise CacheError(f"{path} cannot be written: {error.strerror}") from None
        except RuntimeError as error:  # MLX's
            raise CacheError(f"{path} cannot be written: {error}") from None

    @classmethod
    @device_work
    def load(
        cls, path: str | Path, engine: Engine, options: EngineOptions | None = None
    ) -> PromptCache:
        """Return a store with the sequence of a saved file; `options` are those it was made with.

        Raises `CacheError` if it was made with other weights, another tokenizer or another kind
        of cache, and if it is damaged.
        """
        check_loaded("engine", engine)
        (options,) = with_overrides((EngineOptions,), (options,), {})
        kind = CacheKind.of(engine.config, options)
        try:
            loaded: Any = mx.load(name_for_mlx(path), format="safetensors", return_metadata=True)
        except (OSError, RuntimeError, ValueError) as error:
            what = f"{path} is not a saved cache ({error})"
            raise CacheError(f"{what}; give another file, or move it away") from None
        arrays, about = loaded
        if about.get("format") != FORMAT:
            why = f"its format is {about.get('format')!r}, not {FORMAT!r}"
            what = f"{path} is not a saved cache of this version: {why}"
            raise CacheError(f"{what}. Give another file, or move it away")
        if about.get("fingerprint") != fingerprint(engine):
            what = f"{path} was made with other weights or another tokenizer than {engine.name}'s"
            if (made := about.get("adapter", "no adapter")) != named(engine):
                what = f"{path} was made with {made}, but the model has {named(engine)}"
            raise CacheError(f"{what}; delete it, or use the model it was made with")
        if about.get("kind") != str(kind):
            what = f"{path} has {about.get('kind')}; the options ask for {kind}"
            raise CacheError(f"{what}. Give the same options")
        store = cls()
        try:
            store.put(engine.steps.refresh(), *restored(arrays, about, engine, kind))
        except (KeyError, ValueError, TypeError, RecursionError) as error:
            raise CacheError(f"{path} is damaged: {reason(error)}") from None
        return store


def restored(
    arrays: dict[str, mx.array], about: dict[str, Any], engine: Engine, kind: CacheKind
) -> tuple[list[int], KVCache]:
    """Return the tokens and the cache of a saved file. Raises built-in errors for what is wrong."""
    tokens, offset, config = json.loads(about["tokens"]), int(about["offset"]), engine.config
    if not isinstance(tokens, list) or not 0 < len(tokens) == offset:
        raise ValueError(f"{offset} positions for {len(tokens)} tokens")
    if any(type(token) is not int or not 0 <= token < config.vocab_size for token in tokens):
        raise ValueError("tokens outside the vocabulary")
    cache = KVCache(config, kind)
    slots = kind.layout.capacity if isinstance(kind.layout, Window) else offset
    for number, shape in enumerate(layer_shapes(config)):
        kept = arrays.get(f"{number}.1", arrays[f"{number}.0"]).dtype  # of scales, if any
        like = kind.store.pack(mx.zeros((2, 1, shape.kv_heads, slots, config.head_dim), kept))
        layer = [arrays[f"{number}.{part}"] for part in range(len(like))]
        if wrong := [a.shape for a, b in zip(layer, like, strict=True) if a.shape != b.shape]:
            raise ValueError(f"keys and values of layer {number} have the shape {wrong[0]}")
        types = [a.dtype for a in layer]  # a kernel writes to them as they should be
        if types != [b.dtype for b in like] or not mx.issubdtype(kept, mx.floating):
            what = ", ".join(map(name_of, types))
            raise ValueError(f"keys and values of layer {number} have the types {what}")
        cache.arrays.append(layer)
    cache.offset, cache.written = offset, max(offset, int(about["written"]))
    cache.reserve(offset)
    mx.eval(cache.arrays)
    return tokens, cache


def common_prefix(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Return how many tokens two sequences of one type have in common, from the first on."""
    start, stride = 0, 64  # equal parts are compared in C
    while (part := ours[start : start + stride]) and part == theirs[start : start + stride]:
        start += stride
    for count, (one, other) in enumerate(zip(ours[start:], theirs[start:], strict=False), start):
        if one != other:
            return count
    return min(len(ours), len(theirs))


def continuation(tokenizer: Tokenizer, stored: Sequence[int], text: str) -> tuple[int, int]:
    """Return how many tokens of `stored` spell a beginning of `text`, and its number of characters.

    Where the two differ, the tokens end with the last word that both share.
    """
    if not stored or stored[0] != tokenizer.bos_id:
        return 0, 0

    def visible(token: int) -> bool:
        return token < tokenizer.vocab_size and tokenizer.piece_bytes(token) != b""

    kept, place = spelling(tokenizer, takewhile(visible, stored[1:]), text, words=True)
    return 1 + kept, place


def named(engine: Engine) -> str:
    """Return the adapter of an engine in words, for a saved file."""
    return "no adapter" if engine.adapter is None else f"the adapter {engine.adapter.name}"


def fingerprint(engine: Engine) -> str:
    """Return a sha256 of what keys and values depend on: configuration, tokenizer, every weight.

    A tensor enters by two sums modulo 2^32: of its words, which have the size of an element, and of
    its words weighted by their place.
    """
    about = json.dumps(engine.config.to_hf_dict(), sort_keys=True, default=str)
    digest = hashlib.sha256(about.encode())
    digest.update(repr(sorted((engine.quantization or {}).items(), key=str)).encode())
    digest.update(engine.tokenizer.fingerprint.encode())
    parts = {} if engine.adapter is None else engine.adapter.parts
    digest.update("".join(f"{stem} {part.scale}" for stem, part in parts.items()).encode())
    for name, array in sorted(parameters(engine.model).items()):
        word = {1: mx.uint8, 2: mx.uint16}.get(array.itemsize, mx.uint32)
        words = array.reshape(-1).view(word).astype(mx.uint32)
        places = mx.arange(words.size, dtype=mx.uint32) % 65521 + 1
        sums: Any = mx.stack([words.sum(), (words * places).sum()]).tolist()
        digest.update(f"{name} {array.dtype} {array.shape} {sums}".encode())
    return digest.hexdigest()
