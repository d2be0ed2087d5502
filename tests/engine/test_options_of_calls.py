"""Options where they are given: to functions, classes and commands, none is accepted and
ignored.
"""

from __future__ import annotations

import ast
import inspect
from dataclasses import fields

import pytest

import openelm_mlx
from openelm_mlx import (
    BatchEngine,
    Conversation,
    GenerationOptions,
    ModelDraft,
    SamplingOptions,
    batch_generate,
    generate,
    stream_generate,
)
from openelm_mlx.cli import main
from openelm_mlx.convert import convert
from openelm_mlx.device import mx
from openelm_mlx.engine.options import EngineOptions
from openelm_mlx.errors import OptionError, PromptError


def test_filters_that_a_greedy_choice_ignores_are_named_by_the_command(capsys):
    assert main(["generate", "Once", "--max-tokens", "1", "--top-p", "0.9", "--min-p", "0.1"]) == 0
    assert (
        "openelm: without a --temperature decoding is greedy; ignored: --top-p, --min-p\n"
        in capsys.readouterr().err
    )


def test_objects_of_another_kind_are_refused(tiny):
    with pytest.raises(
        OptionError,
        match=r"sampling is \{'temperature': 1\}; allowed is one made by SamplingOptions",
    ):
        generate(tiny, "Once", {"temperature": 1})
    with pytest.raises(
        OptionError,
        match=r"options is SamplingOptions\(.*; allowed is one made by GenerationOptions",
    ):
        generate(tiny, "Once", options=SamplingOptions())
    with pytest.raises(OptionError, match="options is 5; allowed is one made by EngineOptions"):
        BatchEngine(tiny, options=5)
    with pytest.raises(
        OptionError,
        match="engine_options is GenerationOptions.*; allowed is one made by EngineOptions",
    ):
        generate(tiny, "Once", engine_options=GenerationOptions())
    with pytest.raises(
        OptionError, match="top_k is an option of a request, not of the engine; give it to submit"
    ):
        BatchEngine(tiny, top_k=5)
    with pytest.raises(
        OptionError,
        match="kv_bits is an option of the engine, not of a request; give it to the BatchEngine",
    ):
        BatchEngine(tiny).submit("Once", kv_bits=8)
    for name, ids in (("logit_bias", {4096: 1}), ("stop_tokens", [2, 4096])):
        with pytest.raises(
            OptionError, match=f"{name} has the token id 4096; allowed are ids from 0 to 4095"
        ):
            generate(tiny, "Once", **{name: ids})
    with pytest.raises(OptionError, match="sampling is 5; give one for all, or a list of one each"):
        batch_generate(tiny, ["Once"], 5)
    with pytest.raises(OptionError, match="did you mean 'temperature'"):  # wrong for all
        batch_generate(tiny, ["Once"], temprature=1)
    with pytest.raises(OptionError, match="did you mean 'temperature'"):  # and not 'stream'
        batch_generate(tiny, ["Once"], temp=1)
    with pytest.raises(
        OptionError,
        match=r"options is 'checkpoint.pt'; allowed is one made by ConvertOptions\(source, tar",
    ):
        convert("checkpoint.pt", "m")
    with pytest.raises(OptionError, match="prompt_cache is 5; allowed is a PromptCache"):
        generate(tiny, "Once", prompt_cache=5)
    with pytest.raises(
        OptionError, match="progress is True; allowed is a function of two numbers, or None"
    ):
        stream_generate(tiny, "Once", progress=True)
    with pytest.raises(OptionError, match="target is None; allowed is a loaded model"):
        ModelDraft(None, tiny)
    with pytest.raises(OptionError, match="slots is True"):
        BatchEngine(tiny, slots=True)
    with pytest.raises(PromptError, match="prompts is 5; give a list of prompts"):
        batch_generate(tiny, 5)
    for call in (lambda name: generate(name, "Once"), BatchEngine, Conversation):
        with pytest.raises(
            OptionError,
            match=r"engine is 'openelm-tiny'; allowed is a loaded model, as in engine = load\('",
        ):
            call("openelm-tiny")


def test_options_of_a_conversation_are_checked_when_they_are_given(tiny):
    talk = Conversation(tiny)
    for value in (0, False, "", {}):  # and not taken for none given
        with pytest.raises(OptionError, match="allowed is one made by SamplingOptions"):
            Conversation(tiny, sampling=value)
    with pytest.raises(OptionError, match="sampling is GenerationOptions"):
        talk.sampling = GenerationOptions()
    with pytest.raises(
        OptionError,
        match=r"options is \{'max_tokens': 1\}; allowed is one made by GenerationOptions",
    ):
        talk.options = {"max_tokens": 1}


def test_a_temperature_too_small_to_divide_by_is_greedy(tiny):
    expected = generate(tiny, "Once", max_tokens=4)
    assert all(
        generate(tiny, "Once", max_tokens=4, temperature=t, seed=1) == expected
        for t in (1e-300, 1e-39, 1e-7)
    )


def test_scores_are_changed_by_bias_and_processor_alone_and_in_a_batch(tiny):
    """What `filter_logits` promises, seen from outside: a bias that nothing outweighs, and the same
    as a processor.
    """
    (cat,) = tiny.tokenizer.encode("cat")[1:]

    def biased(logits, newest, positions):
        return logits + 100.0 * (mx.arange(logits.shape[1]) == cat)

    plain = generate(tiny, "Once", max_tokens=4)
    rows = [
        SamplingOptions(logit_bias={cat: 100}),
        SamplingOptions(processor=biased),
        SamplingOptions(),
    ]
    alone = [generate(tiny, "Once", sampling, max_tokens=4) for sampling in rows]
    assert alone[0] == alone[1] == " cat" * 4 != plain == alone[2]
    assert [
        result.text for result in batch_generate(tiny, ["Once"] * 3, rows, max_tokens=4)
    ] == alone


def test_every_option_of_a_function_is_a_keyword_and_explained():
    items = [
        item
        for kind in (SamplingOptions, GenerationOptions, EngineOptions)
        for item in fields(kind)
    ]
    functions = (
        openelm_mlx.generate,
        openelm_mlx.stream_generate,
        openelm_mlx.batch_generate,
        openelm_mlx.Conversation,
    )
    for function in functions:
        words = " ".join(function.__doc__.split())
        assert (
            "\n\n>>> " in function.__doc__ and "\n\nOptions:\n    temperature: " in function.__doc__
        )
        assert all(
            f"{item.name}: {item.type}" in words and item.metadata["help"] in words
            for item in items
        )
        assert "Unpack[Settings]" in str(inspect.signature(function))
    batch = openelm_mlx.BatchEngine
    for function, own in ((batch, items[-5:]), (batch.submit, items[:-5])):
        assert [f"\n    {item.name}: " in function.__doc__ for item in items] == [
            item in own for item in items
        ]
    assert "allowed is a text of at least one character, or a list of such texts" in " ".join(
        words.split()
    )


def test_public_names_are_listed_resolve_and_have_docstrings():
    import openelm_mlx.convert

    for module in (openelm_mlx, openelm_mlx.convert):
        imported = [
            alias.name
            for node in ast.walk(ast.parse(inspect.getsource(module)))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("openelm_mlx.")
            for alias in node.names
        ]
        assert sorted(imported) == sorted(module.__all__) == sorted(module._HOME)
        assert set(module.__all__) <= set(dir(module))
        assert all(inspect.getdoc(getattr(module, name)) for name in module.__all__)
    assert openelm_mlx.encode_messages is openelm_mlx.engine.conversation.encode_messages
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = openelm_mlx.nonsense


def test_an_engine_prints_as_one_line(tiny):
    assert repr(tiny) == "<Engine openelm-tiny: 6.5 M parameters, 7.3 MB, context 1024>"
