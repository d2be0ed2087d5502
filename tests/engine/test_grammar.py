"""Answers of a given form: the masks, by brute force over all texts or by derivatives of the
expression.
"""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from languages import (
    ENGINE,
    EOS,
    PIECES,
    Expression,
    Texts,
    documents,
    engine_of,
    first_space,
    made,
    schemas,
    trees,
    written,
)

from openelm_mlx import (
    GenerationOptions,
)
from openelm_mlx.engine.grammar import Constraint, constraint
from openelm_mlx.engine.tokenizer import StreamingDecoder
from openelm_mlx.errors import OptionError

pytestmark = pytest.mark.needs("llguidance")


FEW = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def tokens_of(mask: np.ndarray) -> set[int]:
    assert mask.dtype == np.uint32
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def assert_walk(found: Constraint, language: Any, rng: random.Random, steps: int = 8) -> list[int]:
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
    assert_walk(made(regex=written(tree)), first_space(Expression(tree)), rng)


@FEW
@given(
    st.lists(st.text(alphabet='ab cé\n"\\/', min_size=1, max_size=5), min_size=1),
    st.randoms(use_true_random=False),
)
def test_masks_of_choices_are_their_beginnings(choices: list[str], rng: random.Random) -> None:
    assert_walk(made(choices=choices), first_space(Texts([text.encode() for text in choices])), rng)


@FEW
@given(schemas(), st.randoms(use_true_random=False))
def test_masks_of_a_schema_are_beginnings_of_its_documents(
    schema: dict[str, Any], rng: random.Random
) -> None:
    texts = {json.dumps(one, ensure_ascii=False).encode() for one in documents(schema)}
    assert_walk(
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
        assert_walk(made(regex=written(tree)), first_space(Expression(tree)), rng, steps=4) + noise
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


def test_a_form_that_becomes_too_complex_on_the_way_can_only_end() -> None:
    found, rng = made(regex="(.*a.{40}){40}"), random.Random(0)
    for _ in range(1000):
        found.accept(3 + rng.choice(b"ab"))
    assert found.broken
    assert tokens_of(found.mask()) == {EOS}
    assert found.along([3 + ord("a")])[1] == 0
