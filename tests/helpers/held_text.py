"""Texts that a cache has in other tokens than their own, and prompts that go on from them."""

from __future__ import annotations

from typing import Any

# parts that were tokenized one by one, a prompt, and how many of the last tokens it does not keep
HELD = [
    (("On", "ce up", "on"), "Once upon", 0),  # the very text
    (("On", "ce up", "on"), "Once upon a", 0),
    # up to the last word that both have
    (("On", "ce up", "on a", " m", "o", "use"), "Once upon a mole", 3),
    # an answer that ended: text goes on before its EOS
    (("On", "ce up", "on", "</s>"), "Once upon a", 1),
    (("Once ", "\n"), "Once \nupon", 0),
]


def ids_of(tokenizer: Any, parts: tuple[str, ...]) -> list[int]:
    """Return the ids of the parts, each tokenized by itself."""
    ids = tokenizer.encode(parts[0])
    for part in parts[1:]:
        ids += [2] if part == "</s>" else tokenizer.encode(part, bos=False, continued=True)
    return list(ids)
