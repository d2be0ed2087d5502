"""A batch, token by token: what a model is trained on, and of which tokens the loss is taken.

row 1: 3 sequences, 64 tokens, of which 21 are trained, and 0 of padding
1: <s> ▁< | s y st em | > \\n </s> ▁ \\n < | u s er | > \\n Why ? </s> ... «So» «.» «</s>»
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.tokenizer import SPACE, Tokenizer
from openelm_mlx.finetune.batches import Batch

if TYPE_CHECKING:
    from rich.text import Text

TRAINED = "green underline"  # a terminal without colours still underlines
HEAD = "bold"
SIDES = ("chosen", "rejected")


def show_batch(engine: Engine, batch: Batch, pairs: bool = False, plain: bool = False) -> Text:
    """Return a text for a terminal, or a `plain` one that marks trained tokens by «».

    Tokens stand apart, a space in one as "▁". With `pairs` the sequences are named as their sides.
    """
    import numpy as np
    from rich.text import Text

    tokens, segments, sequences, weights = (
        np.array(part) for part in (batch.tokens, batch.segments, batch.sequences, batch.weights)
    )
    trained = np.roll(weights, 1, axis=1) > 0  # a token is the target of the place before it
    used = segments > 0
    text = Text()
    for row in np.flatnonzero(used.any(axis=1)):
        count, padding = segments[row].max(), (~used[row]).sum()
        what = f"{count} sequence{'s' * int(count > 1)}, {used[row].sum():,} tokens"
        text.append(f"row {row + 1}: {what} ({trained[row].sum():,} trained), ", HEAD)
        text.append(f"{padding:,} padding\n", HEAD)
        for segment in range(1, count + 1):
            places = np.flatnonzero(segments[row] == segment)
            number = sequences[row, places[0]]
            name = f"pair {number // 2 + 1}, {SIDES[number % 2]}" if pairs else str(number + 1)
            text.append(f"{name}:", HEAD)
            for place in places:
                piece, own = visible(engine.tokenizer, int(tokens[row, place])), trained[row, place]
                text.append(" ")
                text.append(f"«{piece}»" if own and plain else piece, TRAINED if own else None)
            text.append("\n")
    padding, mark = (~used).sum(), "in «»" if plain else "underlined"
    text.append(f"batch: {used.sum():,} tokens ({trained.sum():,} trained, {mark}), ", HEAD)
    size = " x ".join(map(str, used.shape))
    text.append(f"{padding:,} padding ({padding / used.size:.1%} of {size})", HEAD)
    return text


def visible(tokenizer: Tokenizer, token: int) -> str:
    """Return a token's piece with a sign for each space and for what has no shape of its own."""
    if token in (tokenizer.bos_id, tokenizer.eos_id):
        return "<s>" if token == tokenizer.bos_id else "</s>"
    if token >= tokenizer.vocab_size or not (data := tokenizer.piece_bytes(token)):
        return f"<{token}>"
    try:
        text = data.decode().replace(" ", SPACE)
    except UnicodeDecodeError:  # a part of a character
        return "".join(f"<0x{byte:02X}>" for byte in data)
    return "".join(one if one.isprintable() else repr(one)[1:-1] for one in text)
