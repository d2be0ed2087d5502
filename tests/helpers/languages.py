"""Languages by brute force: what may still come of a text, for lists of texts and, by derivatives
(Brzozowski, 1964), for expressions; and a small vocabulary to compare their constraints with.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import strategies as st

from openelm_mlx import GenerationOptions
from openelm_mlx.engine.grammar import Constraint, constraint
from openelm_mlx.engine.tokenizer import Tokenizer


class Texts:
    """A finite set of texts, as what may still come of it."""

    def __init__(self, texts: list[bytes]) -> None:
        self.texts = texts

    def after(self, piece: bytes) -> Texts:
        return Texts([text[len(piece) :] for text in self.texts if text.startswith(piece)])

    @property
    def alive(self) -> bool:
        return bool(self.texts)

    @property
    def may_end(self) -> bool:
        return b"" in self.texts


class Expression:
    """A regular expression by Brzozowski's derivatives: ("set", bytes), ("cat", a, b), ("or", a,
    b), ("star", a).
    """

    EMPTY, NOTHING = ("empty",), ("set", b"")

    def __init__(self, tree: Any) -> None:
        self.tree = tree

    def after(self, piece: bytes) -> Expression:
        tree = self.tree
        for byte in piece:
            tree = derivative(tree, byte)
        return Expression(tree)

    @property
    def alive(self) -> bool:
        return self.tree != self.NOTHING

    @property
    def may_end(self) -> bool:
        return nullable(self.tree)


def nullable(tree: Any) -> bool:
    kind, *parts = tree
    if kind in ("cat", "or"):
        return (all if kind == "cat" else any)(nullable(part) for part in parts)
    return kind in ("empty", "star")


def derivative(tree: Any, byte: int) -> Any:
    kind, *parts = tree
    if kind == "set":
        return Expression.EMPTY if byte in parts[0] else Expression.NOTHING
    if kind == "or":
        return either(derivative(parts[0], byte), derivative(parts[1], byte))
    if kind == "star":
        return joined(derivative(parts[0], byte), tree)
    if kind == "cat":
        first = joined(derivative(parts[0], byte), parts[1])
        return either(first, derivative(parts[1], byte)) if nullable(parts[0]) else first
    return Expression.NOTHING


def either(a: Any, b: Any) -> Any:
    return a if b in (Expression.NOTHING, a) else b if a == Expression.NOTHING else ("or", a, b)


def joined(a: Any, b: Any) -> Any:
    if Expression.NOTHING in (a, b):
        return Expression.NOTHING
    return b if a == Expression.EMPTY else a if b == Expression.EMPTY else ("cat", a, b)


def written(tree: Any) -> str:
    kind, *parts = tree
    if kind == "set":
        return f"[{parts[0].decode()}]" if len(parts[0]) > 1 else parts[0].decode()
    if kind == "star":
        return f"({written(parts[0])})*"
    return "(" + ("" if kind == "cat" else "|").join(map(written, parts)) + ")"


def trees() -> st.SearchStrategy[Any]:
    sets = st.sets(st.sampled_from(list(b"abc y")), min_size=1, max_size=3)
    leaf = sets.map(lambda chosen: ("set", bytes(sorted(chosen))))
    return st.recursive(
        leaf,
        lambda tree: st.one_of(
            st.tuples(st.just("cat"), tree, tree),
            st.tuples(st.just("or"), tree, tree),
            st.tuples(st.just("star"), tree),
        ),
        max_leaves=10,
    )


def documents(schema: dict[str, Any]) -> list[Any]:
    """All documents of a schema that has finitely many, their keys in its order."""
    if "enum" in schema:
        return list(schema["enum"])
    if schema["type"] == "boolean":
        return [True, False]
    if schema["type"] == "integer":
        return list(range(schema["minimum"], schema["maximum"] + 1))
    if schema["type"] == "array":
        items = documents(schema["items"])
        lengths = range(schema.get("minItems", 0), schema["maxItems"] + 1)
        return [list(one) for length in lengths for one in itertools.product(items, repeat=length)]
    found: list[dict[str, Any]] = [{}]
    for key, part in schema["properties"].items():
        more = [{**one, key: value} for one in found for value in documents(part)]
        found = more if key in schema["required"] else found + more
    return found


def schemas() -> st.SearchStrategy[dict[str, Any]]:
    words = st.text(alphabet='ab"\\é 1', max_size=3)  # a newline may be written as \\n or \\u000a
    enum = st.lists(st.one_of(words, st.integers(-9, 99), st.none()), min_size=1, max_size=3)
    leaf = st.one_of(
        enum.map(lambda values: {"enum": values}),
        st.just({"type": "boolean"}),
        st.integers(0, 20).map(lambda low: {"type": "integer", "minimum": low, "maximum": low + 3}),
    )

    def array(items: Any) -> dict[str, Any]:
        return {"type": "array", "items": items, "maxItems": 2}

    def thing(properties: Any) -> dict[str, Any]:
        required = [key for key in properties if key != "b"]
        return {
            "type": "object",
            "properties": properties,
            "required": required,
            "additionalProperties": False,
        }

    keys = st.dictionaries(st.sampled_from(["a", "b", "yes", 'c"é']), leaf, min_size=1, max_size=2)
    return st.one_of(leaf, leaf.map(array), keys.map(thing))


def first_space(language: Any) -> Any:
    """The languages of an answer's tokens: with a space before the text, or else a text that begins
    with none.
    """
    return (
        Spaced
        if isinstance(language, Expression)
        else lambda found: Texts(
            [b" " + text for text in found.texts]
            + [text for text in found.texts if not text.startswith(b" ")]
        )
    )(language)


class Spaced:
    def __init__(self, language: Expression) -> None:
        self.language, self.alive, self.may_end = language, True, language.may_end

    def after(self, piece: bytes) -> Any:
        return self.language.after(piece.removeprefix(b" ")) if piece else self


EOS = 2


# <unk>, <s>, </s>; every byte; and pieces that overlap: spaces before words, parts of JSON, half a
# character
PIECES = [b" \xe2\x81\x87 ", b"", b"", *(bytes([byte]) for byte in range(256))]


PIECES += [
    text.encode()
    for text in (
        "a",
        "b",
        "ab",
        "ba",
        "aab",
        "abc",
        "c",
        " a",
        " ab",
        "  ",
        " c b",
        "bb",
        "cab",
        "yes",
        " yes",
        "no",
        " no",
        "ye",
        '"',
        '": ',
        '", "',
        '{"',
        ' {"',
        '"}',
        "}",
        "]",
        "[",
        ", ",
        ": ",
        "true",
        "false",
        "12",
        "1",
        "2",
        ' "',
        "é",
        "a\n",
        "aé",
    )
] + [b"a\xc3"]


def engine_of(pieces: list[bytes], ends: tuple[int, ...] = (EOS,), vocab: int | None = None) -> Any:
    """What a constraint needs of an engine."""
    tokenizer = Tokenizer(pieces, lambda text, continued: [], Path("none"), "none")
    config = SimpleNamespace(eos_token_ids=ends)
    return SimpleNamespace(tokenizer=tokenizer, vocab=vocab or len(pieces), config=config)


ENGINE = engine_of(PIECES)


def made(engine: Any = ENGINE, **form: Any) -> Constraint:
    found = constraint(engine, GenerationOptions(**form))
    assert found is not None
    return found
