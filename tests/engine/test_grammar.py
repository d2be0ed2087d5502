"""Answers of a given form: the masks, by brute force over all texts or by derivatives of the
expression.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openelm_mlx import (
    BatchEngine,
    Conversation,
    GenerationOptions,
    batch_generate,
    generate,
    load,
    stream_generate,
)
from openelm_mlx.cli import main
from openelm_mlx.cli.options import Parser, add_flags, from_args
from openelm_mlx.engine import grammar
from openelm_mlx.engine.grammar import Constraint, constraint
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.tokenizer import StreamingDecoder, Tokenizer
from openelm_mlx.errors import OptionError, PromptError

pytestmark = pytest.mark.needs("llguidance")

FEW = settings(max_examples=40, deadline=None, derandomize=True, database=None)
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


def tokens_of(mask: np.ndarray) -> set[int]:
    assert mask.dtype == np.uint32
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


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


def check_walk(found: Constraint, language: Any, rng: random.Random, steps: int = 8) -> list[int]:
    """Follow random allowed tokens; at each step the mask is what the language says of every single
    piece.
    """
    text: list[int] = []
    for _ in range(steps):
        assert language.alive
        after = {token: language.after(piece) for token, piece in enumerate(PIECES) if piece}
        expected = {token for token, left in after.items() if left.alive}
        if language.may_end:
            expected.add(EOS)
        assert tokens_of(found.mask()) == expected
        spelled = sorted(expected - {EOS})
        if not spelled:
            break
        text.append(rng.choice(spelled))
        found.accept(text[-1])
        language = after[text[-1]]
    return text


@FEW
@given(trees(), st.randoms(use_true_random=False))
def test_masks_of_an_expression_are_its_derivatives(tree: Any, rng: random.Random) -> None:
    check_walk(made(regex=written(tree)), first_space(Expression(tree)), rng)


@FEW
@given(
    st.lists(st.text(alphabet='ab cé\n"\\/', min_size=1, max_size=5), min_size=1),
    st.randoms(use_true_random=False),
)
def test_masks_of_choices_are_their_beginnings(choices: list[str], rng: random.Random) -> None:
    check_walk(made(choices=choices), first_space(Texts([text.encode() for text in choices])), rng)


@FEW
@given(schemas(), st.randoms(use_true_random=False))
def test_masks_of_a_schema_are_beginnings_of_its_documents(
    schema: dict[str, Any], rng: random.Random
) -> None:
    texts = {json.dumps(one, ensure_ascii=False).encode() for one in documents(schema)}
    check_walk(
        made(json_schema=json.dumps(schema)), first_space(Texts(sorted(texts))), rng, steps=20
    )


@FEW
@given(
    trees(),
    st.lists(st.integers(0, len(PIECES) - 1), max_size=6),
    st.randoms(use_true_random=False),
)
def test_along_is_accepting_one_by_one_and_leaves_no_trace(
    tree: Any, noise: list[int], rng: random.Random
) -> None:
    found, twin = made(regex=written(tree)), made(regex=written(tree))
    drafts = (
        check_walk(made(regex=written(tree)), first_space(Expression(tree)), rng, steps=4) + noise
    )
    begun = drafts[: rng.randrange(3)] if len(drafts) - len(noise) > 2 else []
    for token in begun:
        found.accept(token)
        twin.accept(token)
    before = found.mask().copy()
    masks, usable = found.along(drafts[len(begun) :])
    assert masks.shape == (usable + 1, len(before))
    masks = masks.copy()
    assert (found.mask() == before).all()
    for step, token in enumerate(drafts[len(begun) :][:usable]):
        assert (masks[step] == twin.mask()).all()
        for one in (found, twin):
            one.accept(token)
        assert (found.mask() == twin.mask()).all()
    assert (masks[usable] == twin.mask()).all()
    refused = drafts[len(begun) + usable :][:1]
    assert refused in ([], [EOS]) or refused[0] not in tokens_of(twin.mask())


@pytest.mark.parametrize(
    ("form", "tokens", "text"),
    [
        ({"choices": ("yes", "no")}, b"yes", "yes"),
        ({"choices": ("yes", "no")}, b" yes", "yes"),
        ({"choices": (" yes", "no")}, b"  yes", " yes"),
        ({"regex": r"\d{2}|ten"}, b" 42", "42"),
        ({"regex": "^ten$"}, b"ten", "ten"),
        (
            {"json_schema": '{"enum": [{"a": 1, "b": [2]}]}'},
            b' {"a": 1, "b": [2]}',
            '{"a": 1, "b": [2]}',
        ),
    ],
)
def test_the_text_shown_has_exactly_the_form(
    form: dict[str, Any], tokens: bytes, text: str
) -> None:
    found, decoder = made(**form), StreamingDecoder(ENGINE.tokenizer)
    shown = ""
    for byte in tokens:
        token = 3 + byte
        assert token in tokens_of(found.mask())
        found.accept(token)
        shown += decoder.push(token)
    assert shown == text
    assert tokens_of(found.mask()) == {EOS}


def test_no_form_is_no_constraint() -> None:
    assert constraint(ENGINE, GenerationOptions()) is None


def test_an_interrupt_amid_a_draft_leaves_the_constraint_where_it_was(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, (a, b) = made(regex="abab"), (3 + letter for letter in b"ab")
    before, fill = found.mask().copy(), Constraint._fill

    def interrupted(self: Constraint, row: int) -> Any:
        if row == 2:
            raise KeyboardInterrupt
        return fill(self, row)

    monkeypatch.setattr(Constraint, "_fill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        found.along([a, b, a])
    assert (found.mask() == before).all()


def test_every_token_that_ends_a_text_is_allowed_where_the_text_may_end_and_nowhere_else() -> None:
    a, yes = PIECES.index(b"ab"), PIECES.index(b"yes")
    engine = engine_of(PIECES, ends=(1, EOS))
    found = constraint(engine, GenerationOptions(regex="abab|ab", stop_tokens=(yes, a)))
    assert found is not None
    assert not tokens_of(found.mask()) & {1, EOS, a, yes}
    for byte in b"ab":
        found.accept(3 + byte)
    assert tokens_of(found.mask()) >= {1, EOS, a, yes}
    assert found.along([3 + ord("a"), EOS])[1] == 1
    assert found.along([yes])[1] == 0
    only = made(engine_of(PIECES, ends=(1,)), regex="ab")
    assert (
        only.along([3 + ord("a")])[1] == 1
    )  # there is room for the mask after the last of the drafts
    only.accept(a)
    assert tokens_of(only.mask()) == {1}
    found.accept(EOS)
    assert EOS in tokens_of(found.mask())


def test_rows_of_the_model_beyond_the_vocabulary_are_never_allowed() -> None:
    engine = engine_of(PIECES, vocab=PIECES.index(b"yes"))
    mask = made(engine, choices=("yes",)).mask()
    assert len(mask) == (engine.vocab + 31) // 32
    assert max(tokens_of(mask)) < engine.vocab


def test_the_bundled_tokenizer(tiny: Any) -> None:
    pieces = [tiny.tokenizer.piece_bytes(token) for token in range(tiny.vocab)]
    texts = Texts([b" yes", b"yes", b" yesterday", b"yesterday"])
    expected = {token for token, piece in enumerate(pieces) if piece and texts.after(piece).alive}
    assert tokens_of(made(tiny, choices=("yes", "yesterday")).mask()) == expected
    assert len(expected) > 6


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ({"regex": "a("}, "regex is 'a('; it cannot be followed: unclosed group. Allowed is"),
        (
            {"regex": r"a\b"},
            "it cannot be followed: lookarounds not supported yet; WordUnicode. Allowed is",
        ),
        (
            {"regex": "(?=a)b"},
            "look-around, including look-ahead and look-behind, is not supported. Allowed is",
        ),
        ({"regex": r"[^\x00-\x{10FFFF}]"}, "this model's tokens cannot spell such a text"),
        (
            {"json_schema": '{"type": "strnig"}'},
            "it cannot be followed: Invalid type: strnig. Leave out",
        ),
        (
            {"json_schema": '{"if": {}}'},
            'Unimplemented keys: ["if"]. Leave out what is not supported',
        ),
        ({"json_schema": '{"type": "number", "minimum": "x"}'}, "it cannot be followed: "),
        ({"json_schema": '{"enum": ["\\ud800"]}'}, "it cannot be followed: "),
        ({"json_schema": '{"pattern": "(?=a)"}'}, "it cannot be followed: look-around, including"),
    ],
)
def test_a_form_that_cannot_be_followed(form: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as error:
        made(**form)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith(next(iter(form)))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"regex": "a", "choices": "b"},
            "regex and choices are given; an answer has one format, so leave one out",
        ),
        (
            {"regex": "a", "ignore_eos": True},
            "regex and ignore_eos are given; a constrained answer has an end, so leave one out",
        ),
        ({"json_schema": "[1]"}, "json_schema is '[1]'; allowed is a schema that is an object"),
        ({"json_schema": '{"a":' * 20_000}, "; it is nested too deeply"),
        ({"json_schema": "{"}, "json_schema is '{'; that is not JSON: Expecting property name"),
        (
            {"json_schema": {"a": object()}},
            "that is not JSON: Object of type object is not JSON serializable",
        ),
        ({"regex": "a\ud800"}, "regex is 'a\\ud800'; that is not valid UTF-8, so no text has it"),
        (
            {"choices": ["a", "b\udc80"]},
            "choices is ('a', 'b\\udc80'); that is not valid UTF-8, so no text has it",
        ),
    ],
)
def test_options_that_contradict_each_other_or_are_no_form(
    settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(OptionError) as error:
        GenerationOptions(**settings)
    assert said in str(error.value)


def test_a_schema_is_given_as_text_or_as_a_dict_with_its_keys_in_order() -> None:
    schema = {
        "type": "object",
        "properties": {"b": {"const": 1}, "a": {"const": 2}},
        "required": ["b", "a"],
    }
    options = GenerationOptions(json_schema=schema)  # type: ignore[arg-type]
    assert options == GenerationOptions(json_schema=json.dumps(schema))
    assert hash(options)


@pytest.mark.parametrize(
    ("schema", "texts"),
    [
        ({"type": "integer"}, {"9007199254740992": 16, "90071992547409920": 16, "-12": 3}),
        (
            {"type": ["null", "number"]},
            {"0.123456789": 11, "0.1234567891": 11, "null": 4, "1e5": 1},
        ),
        ({"type": "number", "minimum": 0, "maximum": 1}, {"0.25": 4, "1.5": 2, "-1": 0}),
        ({"type": "number", "exclusiveMaximum": 1e-8, "minimum": 1e-12}, {"0.000000000001": 14}),
        ({"type": "integer", "minimum": 2**54}, {"18014398509481985": 17}),
        ({"type": "number", "multipleOf": 0.5}, {"1.5": 3, "1.25": 2}),
        ({"properties": {"a": {"const": 1}}}, {'{"b"': 2, '{"a": 1}': 8, '{"a": 1, ': 7}),
        ({"properties": {"a": {"const": 1}}, "additionalProperties": {}}, {'{"a": 1, "b"': 12}),
        (
            {"properties": {"a": {"const": 1}}, "required": ["a"], "minProperties": 2},
            {'{"a": 1, "b"': 12},
        ),
        ({"type": "object"}, {'{"b": 1e2': 9}),
        (
            {"allOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"b": {}}}]},
            {'{"a": 1, "b"': 12},
        ),
        ({"items": {"type": "integer"}, "type": "array"}, {"[1, 90071992547409920": 20}),
        ({"enum": [{"type": "integer"}]}, {'{"type": "integer"}': 19}),
        (
            {"properties": {"type": {"type": "integer"}}, "required": ["type"]},
            {'{"type": 9007199254740993': 24},
        ),
    ],
)
def test_what_a_schema_leaves_open_comes_to_an_end(
    schema: dict[str, Any], texts: dict[str, int]
) -> None:
    for text, usable in texts.items():
        assert made(json_schema=schema).along([3 + byte for byte in text.encode()])[1] == usable


def test_flags_of_a_form(tmp_path: Path) -> None:
    parser = Parser(prog="openelm")
    add_flags(parser, GenerationOptions)
    (tmp_path / "schema.json").write_text('{"type": "null"}', encoding="utf-8")

    def read(*words: str) -> GenerationOptions:
        return from_args(GenerationOptions, parser.parse_args(words))

    assert read("--json-schema", str(tmp_path / "schema.json")).json_schema == '{"type": "null"}'
    assert read("--regex", "a,b").regex == "a,b"
    assert read("--choices", "yes,no").choices == ("yes", "no")
    assert read("--choices", "yes, sir", "--choices", "no").choices == ("yes, sir", "no")
    with pytest.raises(PromptError, match="cannot read .*none: No such file or directory"):
        read("--json-schema", str(tmp_path / "none"))


def test_a_form_that_becomes_too_complex_on_the_way_can_only_end() -> None:
    found, rng = made(regex="(.*a.{40}){40}"), random.Random(0)
    for _ in range(1000):
        found.accept(3 + rng.choice(b"ab"))
    assert found.broken
    assert tokens_of(found.mask()) == {EOS}
    assert found.along([3 + ord("a")])[1] == 0


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer"},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
FORMS: list[dict[str, Any]] = [
    {"json_schema": SCHEMA},
    {"temperature": 1.0, "seed": 4},
    {"regex": r"\d{3}-[a-z]{2,5}", "temperature": 1.0, "seed": 5},
    {"choices": ("the king", "the queen"), "temperature": 1.0, "seed": 6, "logprobs": 2},
    {"json_schema": SCHEMA, "temperature": 1.0, "seed": 7, "repetition_penalty": 1.1},
]


def has_form(text: str, form: dict[str, Any]) -> bool:
    if "json_schema" in form:
        found = json.loads(text)
        kinds = {key: type(value) for key, value in found.items()}
        fits = kinds == {"name": str, "age": int, "kind": str} and len(found["name"]) <= 12
        return fits and found["kind"] in ("cat", "dog")
    return bool(re.fullmatch(form["regex"], text)) if "regex" in form else text in form["choices"]


@pytest.fixture(scope="module")
def alone(tiny: Engine) -> list[tuple[str, list[int | None]]]:
    """Text and tokens of each form after the same prompt."""
    runs = [
        list(stream_generate(tiny, "There was a cat; as JSON:", max_tokens=48, **form))
        for form in FORMS
    ]
    return [("".join(event.text for event in run), [event.token for event in run]) for run in runs]


def test_answers_have_their_form_and_end(
    tiny: Engine, alone: list[tuple[str, list[int | None]]]
) -> None:
    for form, (text, tokens) in zip(FORMS, alone, strict=True):
        if len(form) > 2 or "json_schema" in form:
            assert has_form(text, form)
            assert tokens[-1] in tiny.config.eos_token_ids
    cut = "".join(
        event.text
        for event in stream_generate(tiny, "There was a cat; as JSON:", max_tokens=4, **FORMS[0])
    )
    assert 0 < len(cut) < len(alone[0][0]) and alone[0][0].startswith(cut)


@pytest.mark.parametrize("drafts", ["none", "lookup and model"])
def test_answers_of_a_batch_are_those_of_each_alone(
    drafts: str, tiny: Engine, nano: Path, alone: list[tuple[str, list[int | None]]]
) -> None:
    batch = BatchEngine(tiny, draft=load(nano) if drafts != "none" else None, admission=5)
    lookup = {"prompt_lookup": 2} if drafts != "none" else {}
    numbers = [
        batch.submit("There was a cat; as JSON:", max_tokens=48, **form, **lookup) for form in FORMS
    ]
    texts, tokens = dict.fromkeys(numbers, ""), {number: [] for number in numbers}
    counts = {}
    while batch.busy:
        for number, event in batch.step():
            texts[number] += event.text
            tokens[number].append(event.token)
            counts[number] = event.stats
    assert [(texts[number], tokens[number]) for number in numbers] == alone
    drafted = [counts[number].drafted_tokens > 0 for number in numbers]
    assert drafted[:2] == [drafts != "none"] * 2


def test_a_form_that_breaks_cuts_its_own_text_only(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(grammar.LIMITS, "max_lexer_states", 80)
    forms: list[dict[str, Any]] = [{"regex": "[a-z ]{60,200}"}, {}]
    broken, other = batch_generate(
        tiny,
        ["Once upon a time"] * 2,
        options=[GenerationOptions(max_tokens=24, **form) for form in forms],
    )
    assert broken.finish_reason == "length"
    assert 0 < len(broken.tokens) < 24 and broken.tokens[-1] in tiny.config.eos_token_ids
    assert re.fullmatch("[a-z ]{1,59}", broken.text)
    assert other.text == generate(tiny, "Once upon a time", max_tokens=24)


def test_a_conversation_answers_in_the_form(tiny: Engine) -> None:
    talk = Conversation(tiny, options=GenerationOptions(choices=("yes", "no")), seed=3)
    assert "".join(event.text for event in talk.send("Is it late?")) in ("yes", "no")


def test_the_command_line_asks_for_a_form(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "schema.json").write_text('{"enum": [{"a": 1}]}', encoding="utf-8")
    common = ["generate", "Once upon a time", "--max-tokens", "16"]
    for flags, text in (
        (["--json-schema", str(tmp_path / "schema.json")], '{"a": 1}'),
        (["--regex", "a{3}b"], "aaab"),
        (["--choices", "in the forest"], "in the forest"),
    ):
        assert main([*common, *flags]) == 0
        assert capsys.readouterr().out == f"{text}\n"
    assert main([*common, "--regex", "("]) == 2
    assert capsys.readouterr().err.startswith(
        "openelm: regex is '('; it cannot be followed: unclosed group."
    )


def test_a_chat_sets_the_form(
    tmp_path: Path, stdin: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "schema.json").write_text('{"enum": [7]}', encoding="utf-8")
    lines = [
        "/set choices aye,nay",
        "Is it late?",
        "/set choices none",
        "/set regex 4{2}",
        "Is it late?",
    ]
    lines += ["/set regex none", f"/set json_schema {tmp_path / 'schema.json'}", "Is it late?"]
    stdin("\n".join(lines).encode())
    assert main(["chat"]) == 0
    first, *others = capsys.readouterr().out.splitlines()
    assert first in ("aye", "nay") and others == ["44", "7"]


def test_without_llguidance_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(
        OptionError,
        match=r"regex needs the package llguidance; pip install 'openelm-mlx\[grammar\]'",
    ):
        made(regex="an expression that was never seen before")
