"""What is shown of a batch is what is trained, token by token."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from openelm_mlx.engine.loading import Engine
from openelm_mlx.finetune.batches import Shape, packed
from openelm_mlx.finetune.examples import (
    Completion,
    Encoder,
    Example,
    Pair,
    Preference,
    Record,
    sequences_of,
)
from openelm_mlx.finetune.options import FinetuneOptions
from openelm_mlx.finetune.shown import show_batch, visible

TALK = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So « é»\x1b[31m."}]


def encoded(engine: Engine, *records: Record) -> list[Example | Pair]:
    encode = Encoder(engine, FinetuneOptions())
    return [example for record in records for example in encode(record, "here")]


def shape(rows: Sequence[Sequence[Example | Pair]], length: int) -> Shape:
    parts = [part for row in rows for example in row for part in sequences_of(example)]
    return Shape(len(rows) + 1, length, sum(sum(part.trained) for part in parts), len(parts))


def test_each_token_is_shown_and_marked_if_it_is_trained(tiny: Engine):
    one, two, three = encoded(tiny, TALK, "日 and \U0001f600", Completion("a", "b"))
    rows = [[one, two], [three]]
    lines = show_batch(tiny, packed(rows, shape(rows, 128)), plain=True).plain.splitlines()
    found = [line.split(": ", 1)[1].split(" ") for line in lines if line[0].isdigit()]
    for words, example in zip(found, (one, two, three), strict=True):
        assert isinstance(example, Example)
        pieces = [visible(tiny.tokenizer, token) for token in example.tokens]
        assert words == [
            f"«{piece}»" if own else piece
            for piece, own in zip(pieces, example.trained, strict=True)
        ]
    sizes = [len(one.tokens) + len(two.tokens), len(three.tokens)]
    marked = [sum(one.trained) + sum(two.trained), sum(three.trained)]
    padding = 3 * 128 - sum(sizes)
    assert [line for line in lines if not line[0].isdigit()] == [
        f"row 1: 2 sequences, {sizes[0]} tokens ({marked[0]} trained), {128 - sizes[0]} padding",
        f"row 2: 1 sequence, {sizes[1]} tokens ({marked[1]} trained), {128 - sizes[1]} padding",
        f"batch: {sum(sizes)} tokens ({sum(marked)} trained, in «»), {padding} padding "
        f"({padding / 384:.1%} of 3 x 128)",
    ]
    assert lines[1].startswith("1: <s> ▁ < | sy st em | > \\n </s>") and "\x1b" not in lines[1]
    assert lines[1].endswith("«</s>»") and "«\\x1b»" in lines[1]
    assert "«<0xE6>» «<0x97>» «<0xA5>»" in lines[2]


def test_sides_of_pairs_are_named(tiny: Engine):
    pairs = encoded(tiny, *[Preference(TALK, [TALK[0], dict(TALK[1], content="No.")])] * 2)
    shown = show_batch(tiny, packed([pairs], shape([pairs], 256)), pairs=True, plain=True).plain
    names = [line.split(":")[0] for line in shown.splitlines()[1:-1]]
    assert names == ["pair 1, chosen", "pair 1, rejected", "pair 2, chosen", "pair 2, rejected"]


def test_a_terminal_underlines_what_is_trained_also_without_colours(tiny: Engine):
    rows = [encoded(tiny, Completion("a", "b"))]
    text = show_batch(tiny, packed(rows, shape(rows, 128)))
    assert "«" not in text.plain and "trained, underlined)" in text.plain
    for colours, code in ((False, "\x1b[4;32m"), (True, "\x1b[4m")):
        console = Console(force_terminal=True, no_color=colours, color_system="standard", width=80)
        with console.capture() as capture:
            console.print(text)
        assert f"{code}b\x1b[0m {code}</s>\x1b[0m" in capture.get()


def test_tokens_without_a_text_have_a_name(tiny: Engine):
    unknown = tiny.tokenizer.pieces.index(b"")
    assert visible(tiny.tokenizer, tiny.tokenizer.vocab_size) == f"<{tiny.tokenizer.vocab_size}>"
    assert visible(tiny.tokenizer, unknown) in ("<s>", "</s>", f"<{unknown}>")
