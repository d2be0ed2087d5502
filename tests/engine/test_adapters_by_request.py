"""Adapters chosen by request: each answers as it does alone, and nothing passes between them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from interrupts import InterruptAt, finished
from small import merged_model, random_adapter, random_engine

from openelm_mlx import (
    BatchEngine,
    Conversation,
    ModelDraft,
    PromptCache,
    batch_generate,
    generate,
    stream_generate,
)
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.options import GenerationOptions, SamplingOptions
from openelm_mlx.errors import CacheError, OptionError
from openelm_mlx.model.adapters import Adapter
from openelm_mlx.model.decoder import parameters

NAMES = (None, "one", "two")
PROMPT = [1] + [(5 * i) % 60 + 3 for i in range(70)]
SEVERAL = [(name, PROMPT[: 71 - 9 * k]) for k in range(3) for name in NAMES]


@pytest.fixture(scope="module")
def engine(tiny):
    made = random_engine(tiny, 1, tiny.vocab)
    for seed, name in enumerate(NAMES[1:], 1):
        made.load_adapter(random_adapter(made.model, seed, dora=seed == 2), name)
    return made


def wanted(engine, name, prompt, **settings):
    """The tokens of the merged model."""
    one = engine
    if name is not None:
        model = merged_model(engine.model, engine.adapters[name].adapter)
        one = Engine(model, engine.tokenizer, engine.config, "merged", engine.path)
    return [event.token for event in stream_generate(one, prompt, **settings)]


def tokens_of(engine, name, prompt, **settings):
    return [e.token for e in stream_generate(engine, prompt, adapter=name, **settings)]


def test_base_and_adapters_in_one_batch_answer_as_the_merged_models_do(engine):
    settings = {"max_tokens": 12, "ignore_eos": True}
    answers = {name: wanted(engine, name, PROMPT, **settings) for name in NAMES}
    assert len({tuple(answer) for answer in answers.values()}) == 3
    options = [GenerationOptions(adapter=name, **settings) for name, _ in SEVERAL]
    prompts = [prompt for _, prompt in SEVERAL]
    alone = [tokens_of(engine, name, prompt, **settings) for name, prompt in SEVERAL]
    assert alone[:3] == list(answers.values())
    for slots in (1, 4):
        store = PromptCache()
        for _ in range(2):  # the second time all prompts are in the cache
            results = batch_generate(
                engine, prompts, options=options, slots=slots, prompt_cache=store
            )
            assert [list(result.tokens) for result in results] == alone
        reused = [result.stats.reused_tokens for result in results]
        if slots == 1:  # prompts that are prefilled together are not looked up
            assert reused == [len(prompt) - 1 for prompt in prompts]


def test_every_adapter_gets_its_turn_in_every_step(engine):
    batch, got = BatchEngine(engine, 3), {}
    for name in NAMES:
        batch.submit(PROMPT, adapter=name, max_tokens=20, ignore_eos=True)
    while batch.busy:
        for number, _ in batch.step():
            got.setdefault(number, []).append(number)
        counts = [len(events) for events in got.values()]
        assert len(counts) < 3 or max(counts) - min(counts) <= 2
    assert [len(events) for events in got.values()] == [20] * 3
    assert batch.step() == [] and len(batch._lanes) == 1  # no lane is kept for an adapter


def test_lookups_and_draft_models_change_no_adapters_text(engine):
    draft = random_engine(engine, 1, engine.vocab, noise=0.3)
    sampling = SamplingOptions(temperature=0.8, seed=3)
    how = {"sampling": sampling, "max_tokens": 12}
    plain = {name: tokens_of(engine, name, PROMPT, **how) for name in NAMES}
    for about in ({"prompt_lookup": 3}, {"draft": draft}, {"draft": ModelDraft(engine, draft)}):
        store = PromptCache()
        for name in NAMES * 2:  # the second time the prompt is in the cache
            more = {"adapter": name, "prompt_cache": store, **how, **about}
            again = list(stream_generate(engine, PROMPT, **more))
            assert [event.token for event in again] == plain[name]
            assert "draft" not in about or again[-1].stats.drafted_tokens > 0


def test_an_interrupt_in_any_lane_loses_nothing(engine):
    draft, settings = random_engine(engine, 1, engine.vocab, noise=0.3), {"max_tokens": 9}
    answers = [tokens_of(engine, name, PROMPT[:20], ignore_eos=True, **settings) for name in NAMES]
    for line in range(400, 9000, 1711):
        interrupt = InterruptAt(line)
        batch = BatchEngine(engine, 4, draft=draft, prompt_cache=PromptCache())
        for name in NAMES:
            batch.submit(PROMPT[:20], adapter=name, ignore_eos=True, **settings)
        assert sorted(finished(batch, interrupt)) == sorted(answers) and interrupt.done, line


def test_a_request_of_an_adapter_is_cancelled_among_others(engine):
    batch = BatchEngine(engine, 2, prompt_cache=PromptCache())
    numbers = [batch.submit(PROMPT[:9], adapter=name, max_tokens=9) for name in NAMES]
    batch.step(), batch.step()
    assert batch.cancel(numbers[1]) and not batch.cancel(numbers[1])
    assert batch.prompt_cache.tokens[:9] == PROMPT[:9]
    assert {number for _ in range(20) for number, _ in batch.step()} == {numbers[0], numbers[2]}
    batch.close()
    assert not batch.busy


def test_a_saved_cache_says_its_adapter_and_serves_no_other(engine, tmp_path):
    file, store, one = tmp_path / "one.safetensors", PromptCache(), engine.adapted("one")
    tokens_of(engine, "one", PROMPT, max_tokens=3, prompt_cache=store)
    with pytest.raises(CacheError, match="the cache has nothing that random-1 has run"):
        store.save(file, engine)
    store.save(file, one)
    again = PromptCache.load(file, one)
    assert again.tokens == store.tokens
    found = list(stream_generate(engine, PROMPT, adapter="one", prompt_cache=again, max_tokens=9))
    assert found[-1].stats.reused_tokens == len(PROMPT) - 1
    assert [event.token for event in found] == tokens_of(engine, "one", PROMPT, max_tokens=9)
    for other, words in ((engine, "no adapter"), (engine.adapted("two"), "the adapter random-2")):
        with pytest.raises(CacheError) as error:
            PromptCache.load(file, other)
        assert str(error.value) == (
            f"{file} was made with the adapter random-1, but the model has {words}; delete it, or "
            "use the model it was made with"
        )
    parts = one.adapter.parts.items()
    scaled = {stem: replace(part, scale=2 * part.scale) for stem, part in parts}
    stronger = engine.load_adapter(Adapter("random-1", scaled), "stronger")
    with pytest.raises(CacheError, match="other weights or another tokenizer than random-1 with"):
        PromptCache.load(file, stronger)
    del engine.adapters["stronger"]


def test_a_conversation_goes_on_with_its_adapter(engine):
    texts, settings = {}, {"max_tokens": 9, "temperature": 0.0}

    def say(talk, text):
        return "".join(event.text for event in talk.send(text))

    for name in NAMES:
        talk = Conversation(engine, adapter=name, **settings)
        first = say(talk, "Hello")
        for _ in talk.send("And then?"):
            break  # which ends the answer
        again = Conversation.from_json(engine, talk.to_json(), adapter=name, **settings)
        texts[name] = (first, say(talk, "More"))
        assert say(again, "More") == texts[name][1]
    assert len(set(texts.values())) == 3
    assert say(Conversation(engine.adapted("one"), **settings), "Hello") == texts["one"][0]


def test_an_adapter_shares_the_weights(engine):
    ours, one = parameters(engine.model), engine.adapted("one")
    theirs = {id(array): array for array in parameters(one.model).values()}
    assert all(id(array) in theirs for array in ours.values())
    assert engine.adapted(None) is engine and engine.adapters["one"] is one
    assert repr(one).startswith("<Engine random-1 with one: ")
    assert one.nbytes == engine.nbytes + sum(
        4 * (part.a.size + part.b.size) for part in one.adapter.parts.values()
    )


def test_mistakes(engine):
    for name in ("three", ""):
        with pytest.raises(OptionError) as error:
            generate(engine, "a", adapter=name)
        assert str(error.value) == f"random-1 has no adapter {name!r}; loaded: 'one', 'two'"
    with pytest.raises(OptionError) as error:
        generate(engine.adapted("one"), "a", adapter="two")
    assert "has no adapter 'two'; loaded: none; load it with load_adapter" in str(error.value)
    adapter = engine.adapters["one"].adapter
    for given, text in (
        ((3,), "adapter is 3; allowed is the folder of one"),
        ((adapter, ""), "the name of an adapter is ''; allowed is a text"),
        ((adapter, 3), "the name of an adapter is 3; allowed is a text"),
    ):
        with pytest.raises(OptionError, match=text):
            engine.load_adapter(*given)
    with pytest.raises(OptionError) as error:
        engine.load_adapter(adapter, "one")
    assert str(error.value) == (
        "random-1 has an adapter 'one' already; give another name, or first remove it from "
        "engine.adapters"
    )
    with pytest.raises(OptionError) as error:
        engine.adapted("one").load_adapter(adapter, "again")
    assert str(error.value) == (
        "random-1 with one applies an adapter; load another one into the engine without it"
    )
