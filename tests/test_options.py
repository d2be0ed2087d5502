"""Options are checked by type and range, explained where a reader looks, and none is accepted and ignored."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import mlx.core as mx
import numpy as np
import pytest
from openelm_mlx.convert import ConvertOptions, convert

import openelm_mlx
from openelm_mlx import (
    BatchEngine,
    Conversation,
    GenerationOptions,
    ModelDraft,
    SamplingOptions,
    batch_generate,
    generate,
    options,
    stream_generate,
)
from openelm_mlx.cli.main import main
from openelm_mlx.errors import OptionError, PromptError, reason
from openelm_mlx.options import Settings, with_overrides

FIELDS = [*fields(SamplingOptions), *fields(GenerationOptions)]


@pytest.mark.parametrize(
    ("name", "given", "stored"),
    [
        ("max_tokens", 4.0, 4), ("max_tokens", np.int64(3), 3), ("max_tokens", mx.array(3), 3), ("kv_bits", 8.0, 8),
        ("seed", np.uint32(7), 7), ("temperature", 1, 1.0), ("temperature", np.float32(0.5), 0.5), ("top_k", np.float64(5), 5),
        ("ignore_eos", np.bool_(True), True), ("stop", "x", ("x",)), ("stop", ["x", "y"], ("x", "y")), ("seed", None, None),
    ],
)  # fmt: skip
def test_what_loses_nothing_is_converted(name, given, stored):
    value = next(getattr(o, name) for o in with_overrides(None, None, {name: given}) if hasattr(o, name))
    assert value == stored and type(value) is type(stored)


@pytest.mark.parametrize(
    ("name", "given", "text"),
    [
        ("max_tokens", 2.5, "is 2.5; allowed is a whole number from 1 up"),
        ("max_tokens", float("inf"), "is inf; allowed is a whole number from 1 up"),
        ("max_tokens", "4", "is '4'; allowed is a whole number from 1 up"),
        ("max_tokens", None, "is None; allowed is a whole number from 1 up"),
        ("max_tokens", True, "is True; allowed is a whole number from 1 up"),
        ("max_tokens", np.array([4, 5]), r"is array\(\[4, 5\]\); allowed is a whole number from 1 up"),
        ("logprobs", 1.5, "is 1.5; allowed is a whole number from 0 to 100, or None"),
        ("seed", np.uint64(2**63), "; allowed is a whole number from 0 to 9223372036854775807, or None"),
        ("kv_bits", 5, "is 5; allowed: 4, 8, or None"),
        ("temperature", float("nan"), "is nan; allowed is a number from 0.0 to 100.0"),
        ("temperature", 10**400, "allowed is a number from 0.0 to 100.0"),
        ("temperature", "1", "is '1'; allowed is a number from 0.0 to 100.0"),
        ("temperature", 1j, "is 1j; allowed is a number"),
        ("ignore_eos", "no", "is 'no'; allowed is True or False"),
        ("compiled", 0, "is 0; allowed is True or False"),
        ("compiled", np.int64(0), "allowed is True or False"),
        ("stop", None, "is None; allowed is a text of at least one character, or a list of such texts"),
        ("stop", ["x", b"y"], "allowed is a text of at least one character, or a list"),
        ("kv_keep", 5, "is 5, but there is no window; give kv_window too"),
    ],
)
def test_another_type_or_range_is_refused_with_name_value_and_what_is_allowed(name, given, text):
    with pytest.raises(OptionError, match=f"^{name} .*{text}") as caught:
        with_overrides(None, None, {name: given})
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 200


def test_options_of_a_conversion_are_checked_likewise(tmp_path):
    made = ConvertOptions(str(tmp_path), tmp_path / "x", bits=np.int64(4), tokenizer="~/t.model")
    assert made.source == tmp_path and type(made.bits) is int and made.tokenizer == Path.home() / "t.model"
    for name, given, text in (("source", 5, "a path in UTF-8"), ("target", "", "a path"), ("tokenizer", "a\0", "a path"),
                              ("source", "a\udcff", "a path"), ("dry_run", "yes", "True or False"),
                              ("recipe", 5, "a text, or None"),
                              ("rope_base", float("inf"), "a number from 1.0 to")):  # fmt: skip
        with pytest.raises(OptionError, match=re.escape(f"{name} is {given!r}; allowed is {text}")):
            ConvertOptions(**({"source": "a", "target": "b"} | {name: given}))


def test_parts_of_a_conversion_that_nothing_uses_are_refused():
    for given, text in (({"calibration_tokens": 512, "target_bpw": 4.0}, "--calibration-tokens is used by --calibrate"),
                        ({"rank_stabilised": True}, "--rank-stabilised is used by --lora-alpha")):  # fmt: skip
        with pytest.raises(OptionError, match=text):
            ConvertOptions("a", "b", **given)


def test_filters_that_a_greedy_choice_ignores_are_named(capsys):
    assert SamplingOptions(top_p=0.9, min_p=0.1).idle == ["top_p", "min_p"] and SamplingOptions(top_k=5).idle == ["top_k"]
    assert not SamplingOptions(temperature=1, top_p=0.9).idle and not SamplingOptions(top_k=1).idle
    assert main(["generate", "Once", "--max-tokens", "1", "--top-p", "0.9", "--min-p", "0.1"]) == 0
    assert "openelm: without a --temperature decoding is greedy; ignored: --top-p, --min-p\n" in capsys.readouterr().err


def test_objects_of_another_kind_are_refused(tiny):
    with pytest.raises(OptionError, match=r"sampling is \{'temperature': 1\}; allowed is one made by SamplingOptions"):
        generate(tiny, "Once", {"temperature": 1})
    with pytest.raises(OptionError, match=r"options is SamplingOptions\(.*; allowed is one made by GenerationOptions"):
        generate(tiny, "Once", options=SamplingOptions())
    with pytest.raises(OptionError, match="options is 5; allowed is one made by GenerationOptions"):
        BatchEngine(tiny, options=5)
    with pytest.raises(OptionError, match="sampling is 5; give one for all, or a list of one each"):
        batch_generate(tiny, ["Once"], 5)
    with pytest.raises(OptionError, match="did you mean 'temperature'"):  # wrong for all
        batch_generate(tiny, ["Once"], temprature=1)
    with pytest.raises(OptionError, match="did you mean 'temperature'"):  # and not 'stream'
        batch_generate(tiny, ["Once"], temp=1)
    with pytest.raises(OptionError, match=r"options is 'checkpoint.pt'; allowed is one made by ConvertOptions\(source, target\)"):
        convert("checkpoint.pt", "m")
    with pytest.raises(OptionError, match="prompt_cache is 5; allowed is a PromptCache"):
        generate(tiny, "Once", prompt_cache=5)
    with pytest.raises(OptionError, match="progress is True; allowed is a function of two numbers, or None"):
        stream_generate(tiny, "Once", progress=True)
    with pytest.raises(OptionError, match="target is None; allowed is a loaded model"):
        ModelDraft(None, tiny)
    with pytest.raises(OptionError, match="slots is True"):
        BatchEngine(tiny, slots=True)
    with pytest.raises(PromptError, match="prompts is 5; give a list of prompts"):
        batch_generate(tiny, 5)
    for call in (lambda name: generate(name, "Once"), BatchEngine, Conversation):
        with pytest.raises(OptionError, match=r"engine is 'openelm-tiny'; allowed is a loaded model, as in engine = load\('"):
            call("openelm-tiny")


def test_options_of_a_conversation_are_checked_when_they_are_given(tiny):
    talk = Conversation(tiny)
    for value in (0, False, "", {}):  # and not taken for none given
        with pytest.raises(OptionError, match="allowed is one made by SamplingOptions"):
            Conversation(tiny, sampling=value)
    with pytest.raises(OptionError, match="sampling is GenerationOptions"):
        talk.sampling = GenerationOptions()
    with pytest.raises(OptionError, match=r"options is \{'max_tokens': 1\}; allowed is one made by GenerationOptions"):
        talk.options = {"max_tokens": 1}


def test_a_temperature_too_small_to_divide_by_is_greedy(tiny):
    expected = generate(tiny, "Once", max_tokens=4)
    assert all(generate(tiny, "Once", max_tokens=4, temperature=t, seed=1) == expected for t in (1e-300, 1e-39, 1e-7))


def test_every_option_is_a_keyword_with_type_and_text():
    """What editors and type checkers know of options, and what `help` prints, is what the options classes say."""
    hints = {name: kind for cls in (SamplingOptions, GenerationOptions) for name, kind in get_type_hints(cls).items()}
    known = get_type_hints(Settings)
    assert set(known) == set(hints) and {name for name in hints if known[name] != hints[name]} == {"stop"}
    tree = ast.parse(inspect.getsource(options))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Settings")[1:]
    texts = {name.target.id: text.value.value for name, text in zip(body[::2], body[1::2], strict=True)}
    assert texts == {item.name: item.metadata["help"] for item in FIELDS}
    functions = (openelm_mlx.generate, openelm_mlx.stream_generate, openelm_mlx.batch_generate, openelm_mlx.Conversation)
    for function in functions:
        words = " ".join(function.__doc__.split())
        assert "\n\n>>> " in function.__doc__ and "\n\nOptions:\n    temperature: " in function.__doc__
        assert all(f"{item.name}: {item.type}" in words and item.metadata["help"] in words for item in FIELDS)
        assert "Unpack[Settings]" in str(inspect.signature(function))
    for cls in (SamplingOptions, GenerationOptions, ConvertOptions):
        words = " ".join(cls.__doc__.split())
        assert all(f.metadata["help"] in words for f in fields(cls) if f.metadata)


def test_public_names_are_listed_resolve_and_have_docstrings():
    import openelm_mlx.convert

    for module in (openelm_mlx, openelm_mlx.convert):
        imported = [alias.name for node in ast.walk(ast.parse(inspect.getsource(module)))
                    if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("openelm_mlx.")
                    for alias in node.names]  # fmt: skip
        assert sorted(imported) == sorted(module.__all__) == sorted(module._HOME)
        assert set(module.__all__) <= set(dir(module))
        assert all(inspect.getdoc(getattr(module, name)) for name in module.__all__)
    assert openelm_mlx.encode_messages is openelm_mlx.chat.encode_messages
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = openelm_mlx.nonsense


def test_an_engine_prints_as_one_line(tiny):
    assert repr(tiny) == "<Engine openelm-tiny: 6.5 M parameters, 7.3 MB, context 1024>"


def test_errors_of_others_are_told_without_the_names_of_classes():
    assert reason(KeyError("tokens")) == "'tokens' is missing"
    assert reason(ValueError("of one\nand two")) == "of one" and reason(ValueError()) == "it gave no reason"
