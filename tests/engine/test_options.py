"""Options are checked by type and range, explained where a reader looks, and none is accepted and
ignored.
"""

from __future__ import annotations

import re
from dataclasses import MISSING, fields
from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest

from openelm_mlx.cli.options import Parser, add_flags, from_args
from openelm_mlx.convert import ConvertOptions
from openelm_mlx.device import mx
from openelm_mlx.engine.options import (
    EngineOptions,
    EngineSettings,
    GenerationOptions,
    RequestSettings,
    SamplingOptions,
    Settings,
    check_token_ids,
    with_overrides,
)
from openelm_mlx.errors import OptionError, reason
from openelm_mlx.fields import as_annotated, nearest, within

REQUEST = (SamplingOptions, GenerationOptions)
RUN = (*REQUEST, EngineOptions)


def made(**settings):
    """The three options objects of a run."""
    return with_overrides(RUN, (None, None, None), settings)


def test_defaults_are_in_the_types_of_their_annotations():
    """`check_fields` takes them as they are."""
    items = [item for kind in (*RUN, ConvertOptions) for item in fields(kind)]
    for item in [item for item in items if item.default is not MISSING]:
        value = as_annotated(str(item.type), item.default)
        assert (type(value), value) == (type(item.default), item.default)
        assert within(item, value)


class Unhashable:
    __hash__ = None

    def __call__(self, logits, newest, positions):
        return logits


@pytest.mark.parametrize(
    ("name", "given", "stored"),
    [
        ("max_tokens", 4.0, 4),
        ("max_tokens", np.int64(3), 3),
        ("max_tokens", mx.array(3), 3),
        ("kv_bits", 8.0, 8),
        ("seed", np.uint32(7), 7),
        ("temperature", 1, 1.0),
        ("temperature", np.float32(0.5), 0.5),
        ("top_k", np.float64(5), 5),
        ("ignore_eos", np.bool_(True), True),
        ("stop", "x", ("x",)),
        ("stop", ["x", "y"], ("x", "y")),
        ("seed", None, None),
        ("logit_bias", {5: 1, 3: np.float32(0.5)}, ((3, 0.5), (5, 1.0))),
        ("logit_bias", "7=-100", ((7, -100.0),)),
        ("logit_bias", ["3=1", (3, 2)], ((3, 2.0),)),
        ("logit_bias", {}, ()),
        ("logit_bias", {"4": "1.5"}, ((4, 1.5),)),
        ("processor", max, max),
        ("processor", None, None),
        ("stop_tokens", 2, (2,)),
        ("stop_tokens", [2, np.int64(3)], (2, 3)),
    ],
)
def test_what_loses_nothing_is_converted(name, given, stored):
    value = next(getattr(o, name) for o in made(**{name: given}) if hasattr(o, name))
    assert value == stored and type(value) is type(stored)


@pytest.mark.parametrize(
    ("name", "given", "text"),
    [
        ("max_tokens", 2.5, "is 2.5; allowed is a whole number from 1 up"),
        ("max_tokens", float("inf"), "is inf; allowed is a whole number from 1 up"),
        ("max_tokens", "4", "is '4'; allowed is a whole number from 1 up"),
        ("max_tokens", None, "is None; allowed is a whole number from 1 up"),
        ("max_tokens", True, "is True; allowed is a whole number from 1 up"),
        (
            "max_tokens",
            np.array([4, 5]),
            r"is array\(\[4, 5\]\); allowed is a whole number from 1 up",
        ),
        ("logprobs", 1.5, "is 1.5; allowed is a whole number from 0 to 100, or None"),
        (
            "seed",
            np.uint64(2**63),
            "; allowed is a whole number from 0 to 9223372036854775807, or None",
        ),
        ("kv_bits", 5, "is 5; allowed: 4, 8, or None"),
        ("temperature", float("nan"), "is nan; allowed is a number from 0.0 to 100.0"),
        ("temperature", 10**400, "allowed is a number from 0.0 to 100.0"),
        ("temperature", "1", "is '1'; allowed is a number from 0.0 to 100.0"),
        ("temperature", 1j, "is 1j; allowed is a number"),
        ("ignore_eos", "no", "is 'no'; allowed is True or False"),
        ("compiled", 0, "is 0; allowed is True or False"),
        ("compiled", np.int64(0), "allowed is True or False"),
        (
            "stop",
            None,
            "is None; allowed is a text of at least one character, or a list of such texts",
        ),
        ("stop", ["x", b"y"], "allowed is a text of at least one character, or a list"),
        ("kv_keep", 5, "is 5, but there is no window; give kv_window too"),
        ("xtc_threshold", 0.2, "is 0.2, but nothing is excluded; give xtc_probability too"),
        ("penalty_window", 64, "is 64, but there is no penalty; give one, or leave it out"),
        (
            "stop_tokens",
            [2, -1],
            r"is \[2, -1\]; allowed is a whole number, or a list of such numbers from 0 to 2147",
        ),
        ("stop_tokens", "</s>", "is '</s>'; allowed is a whole number, or a list of such numbers"),
        ("processor", 5, "is 5; allowed is a hashable function, or None"),
        ("processor", Unhashable(), "allowed is a hashable function, or None"),
        *[
            (
                "logit_bias",
                wrong,
                "allowed is a dict of token ids to numbers, or texts ID=NUMBER, from -100.0 to 100",
            )
            for wrong in (
                {5: 101},
                {-1: 1},
                {1.5: 1},
                {5: "x"},
                "5",
                "5=",
                "5=nan",
                "a=1",
                5,
                None,
                [5],
                {True: 1},
                "1=2=3",
            )
        ],
    ],
)
def test_another_type_or_range_is_refused_with_name_value_and_what_is_allowed(name, given, text):
    with pytest.raises(OptionError, match=f"^{name} .*{text}") as caught:
        made(**{name: given})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_options_of_a_conversion_are_checked_likewise(tmp_path):
    made = ConvertOptions(str(tmp_path), tmp_path / "x", bits=np.int64(4), tokenizer="~/t.model")
    assert (
        made.source == tmp_path
        and type(made.bits) is int
        and made.tokenizer == Path.home() / "t.model"
    )
    for name, given, text in (
        ("source", 5, "a path in UTF-8"),
        ("target", "", "a path"),
        ("tokenizer", "a\0", "a path"),
        ("source", "a\udcff", "a path"),
        ("dry_run", "yes", "True or False"),
        ("recipe", 5, "a text, or None"),
        ("rope_base", float("inf"), "a number from 1.0 to"),
    ):
        with pytest.raises(OptionError, match=re.escape(f"{name} is {given!r}; allowed is {text}")):
            ConvertOptions(**({"source": "a", "target": "b"} | {name: given}))


def test_parts_of_a_conversion_that_nothing_uses_are_refused():
    for given, text in (
        (
            {"calibration_tokens": 512, "target_bpw": 4.0},
            "--calibration-tokens is used by --calibrate",
        ),
        ({"rank_stabilised": True}, "--rank-stabilised is used by --lora-alpha"),
    ):
        with pytest.raises(OptionError, match=text):
            ConvertOptions("a", "b", **given)


def test_filters_that_a_greedy_choice_ignores_are_named():
    assert SamplingOptions(top_p=0.9, min_p=0.1).idle == ["top_p", "min_p"] and SamplingOptions(
        top_k=5
    ).idle == ["top_k"]
    assert SamplingOptions(xtc_probability=0.5).idle == ["xtc_probability"]
    assert not SamplingOptions(temperature=1, top_p=0.9).idle and not SamplingOptions(top_k=1).idle


def test_options_are_replaced_where_they_belong():
    sampling, request, engine = made(temperature=1, max_tokens=3, kv_bits=4)
    assert (sampling, request, engine) == (
        SamplingOptions(temperature=1.0),
        GenerationOptions(max_tokens=3),
        EngineOptions(kv_bits=4),
    )
    assert hash(SamplingOptions(logit_bias={1: 2})) == hash(SamplingOptions(logit_bias={1: 2.0}))
    assert with_overrides(RUN, (sampling, request, engine), {}) == (sampling, request, engine)
    again = with_overrides(REQUEST, (sampling, None), {"top_k": 5})
    assert again == (SamplingOptions(temperature=1.0, top_k=5), GenerationOptions())
    assert with_overrides((EngineOptions,), (None,), {"kv_bits": 8}) == (EngineOptions(kv_bits=8),)


def test_an_option_that_is_misplaced_or_unknown_is_refused():
    for kinds, name, text in (
        (
            REQUEST,
            "kv_bits",
            "kv_bits is an option of the engine, not of a request; give it to the BatchEngine",
        ),
        (
            (EngineOptions,),
            "top_k",
            "top_k is an option of a request, not of the engine; give it to submit",
        ),
        (
            (EngineOptions,),
            "stop",
            "stop is an option of a request, not of the engine; give it to submit",
        ),
        (RUN, "temp", "unknown option 'temp'; did you mean 'temperature'?"),
        (
            (EngineOptions,),
            "zz",
            "unknown option 'zz'; known: prefill_chunk, compiled, kv_bits, kv_window, kv_keep",
        ),
    ):
        with pytest.raises(OptionError) as caught:
            with_overrides(kinds, (None,) * len(kinds), {name: 1})
        assert str(caught.value) == text
    for kinds, given, text in (
        (
            RUN,
            ({"top_k": 1}, None, None),
            "sampling is {'top_k': 1}; allowed is one made by SamplingOptions(...), or keywords",
        ),
        (
            RUN,
            (None, 0, None),
            "options is 0; allowed is one made by GenerationOptions(...), or keywords",
        ),
        (
            RUN,
            (None, None, 5),
            "engine_options is 5; allowed is one made by EngineOptions(...), or keywords",
        ),
        (
            (EngineOptions,),
            (5,),
            "options is 5; allowed is one made by EngineOptions(...), or keywords",
        ),
    ):
        with pytest.raises(OptionError) as caught:
            with_overrides(kinds, given, {})
        assert str(caught.value) == text


def test_token_ids_that_the_model_does_not_have_are_refused():
    check_token_ids(
        SamplingOptions(logit_bias={99: 1}), GenerationOptions(stop_tokens=[0, 99]), 100
    )
    with pytest.raises(
        OptionError, match="^logit_bias has the token id 100; allowed are ids from 0 to 99$"
    ):
        check_token_ids(SamplingOptions(logit_bias={5: 1, 100: 1}), GenerationOptions(), 100)
    with pytest.raises(
        OptionError, match="^stop_tokens has the token id 100; allowed are ids from 0 to 99$"
    ):
        check_token_ids(SamplingOptions(), GenerationOptions(stop_tokens=100), 100)


def test_every_option_is_a_keyword_with_type_and_text():
    """What editors and type checkers know of options, and what `help` prints, is what the options
    classes say.
    """
    for kinds, settings in ((REQUEST, RequestSettings), ((EngineOptions,), EngineSettings)):
        hints = {name: kind for cls in kinds for name, kind in get_type_hints(cls).items()}
        known = get_type_hints(settings)
        assert list(known) == list(hints)
        wider = {"stop", "stop_tokens", "logit_bias", "json_schema", "choices"}
        assert {name for name in hints if known[name] != hints[name]} <= wider
    assert set(get_type_hints(Settings)) == {item.name for cls in RUN for item in fields(cls)}
    for cls in (*RUN, ConvertOptions):
        words = " ".join(cls.__doc__.split())
        assert all(f.metadata["help"] in words for f in fields(cls) if f.metadata)


def test_flags_of_options_that_are_lists(capsys):
    parser = Parser(prog="openelm")
    add_flags(parser, SamplingOptions)
    add_flags(parser, GenerationOptions)
    words = [
        "--logit-bias",
        "5=-100",
        "--logit-bias",
        "3=1.5",
        "--stop-token",
        "2",
        "--stop-token",
        "3",
        "--stop",
        "x",
    ]
    args = parser.parse_args(words)
    assert from_args(SamplingOptions, args).logit_bias == ((3, 1.5), (5, -100.0))
    assert from_args(GenerationOptions, args) == GenerationOptions(stop_tokens=(2, 3), stop="x")
    with pytest.raises(
        OptionError, match=r"^logit_bias is \('5',\); allowed is a dict of token ids to numbers, or"
    ):
        from_args(SamplingOptions, parser.parse_args(["--logit-bias", "5"]))
    for words, text in (
        (["--stop-token", "x"], "'x' is not a whole number"),
        (["--processor", "x"], "unknown option --processor"),
    ):
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        assert text in capsys.readouterr().err


def test_errors_of_others_are_told_without_the_names_of_classes():
    assert reason(KeyError("tokens")) == "'tokens' is missing"
    assert (
        reason(ValueError("of one\nand two")) == "of one"
        and reason(ValueError()) == "it gave no reason"
    )


def test_the_word_that_was_meant():
    """The only one that begins so, else the most similar one, if any is similar."""
    assert nearest("t", ["temperature", "seed"]) == "temperature"
    assert nearest("max", ["max_tokens", "max_prompt", "may"]) == "may"
    assert nearest("sed", ["temperature", "seed"]) == "seed"
    assert nearest("x", ["temperature", "seed"]) is None
