"""The compiled step: traced once a block, in place, equal to its eager twin; and nothing left
behind.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from optional import compiles
from small import random_engine

from openelm_mlx import BatchEngine, ModelDraft, PromptCache, batch_generate, stream_generate
from openelm_mlx.device import mx, nn
from openelm_mlx.engine.loading import Engine, cast
from openelm_mlx.model.decoder import parameters

PROMPT = [1, 9, 30, 12, 9, 30, 12, 9]


def variant(tiny, dtype=mx.float32, bits=None) -> Engine:
    engine = random_engine(tiny, seed=1)
    engine.model.load_weights(
        [(name, cast(array, dtype)) for name, array in parameters(engine.model).items()]
    )
    if bits is not None:
        nn.quantize(engine.model, group_size=32, bits=bits)
    mx.eval(engine.model.parameters())
    return Engine(engine.model, engine.tokenizer, engine.config, "variant", engine.path)


@pytest.mark.parametrize(
    "dtype, bits",
    [
        (mx.float32, None),
        (mx.bfloat16, None),
        (mx.float16, None),
        (mx.bfloat16, 4),
        (mx.float32, 8),
    ],
)
def test_compiled_equals_eager_for_every_type_and_width(tiny, dtype, bits):
    engine = variant(tiny, dtype, bits)
    for settings in ({}, {"temperature": 1.0, "seed": 2}, {"kv_bits": 8}):
        runs = [
            [
                e.token
                for e in stream_generate(
                    engine, PROMPT, max_tokens=16, ignore_eos=True, compiled=compiled, **settings
                )
            ]
            for compiled in (True, False)
        ]
        assert runs[0] == runs[1], settings


@pytest.mark.with_or_without("a C++ compiler")
def test_a_step_is_traced_once_a_block_and_prefill_feeds_each_token_once(tiny, monkeypatch):
    """Without a compiler MLX traces nothing and calls the step for each token."""
    engine = random_engine(tiny, seed=1)
    calls = []
    hidden = type(engine.model).hidden

    def counted(self, tokens, cache=None, last=False):
        calls.append(tokens.shape[1] if tokens.ndim == 2 else 1)
        return hidden(self, tokens, cache, last)

    monkeypatch.setattr(type(engine.model), "hidden", counted)
    events = list(stream_generate(engine, PROMPT, max_tokens=300, ignore_eos=True, prefill_chunk=3))
    assert calls[:3] == [3, 3, 2] and set(calls[3:]) == {1} and len(events) == 300  # three chunks
    assert len(calls[3:]) == (2 if compiles() else 299)  # a trace for each of two blocks
    calls.clear()
    list(stream_generate(engine, PROMPT, max_tokens=300, ignore_eos=True))
    assert calls == [8] + [1] * (0 if compiles() else 299)  # nothing is traced again


def test_the_device_works_on_the_next_token_while_the_host_reads_one(tiny, monkeypatch):
    engine, log = random_engine(tiny, seed=1), []
    hidden, tolist = type(engine.model).hidden, mx.array.tolist

    def passes(*arguments, **settings):
        log.append("pass")
        return hidden(*arguments, **settings)

    def reads(array):
        log.append("read")
        return tolist(array)

    monkeypatch.setattr(type(engine.model), "hidden", passes)
    monkeypatch.setattr(mx.array, "tolist", reads)
    list(stream_generate(engine, PROMPT, max_tokens=4, ignore_eos=True, compiled=False))
    first, rest = ["pass", "read"], ["pass", "pass", "read", "pass", "read", "read"]
    assert log == [*first, *rest]  # the second token is read when the third is begun, and so on


@pytest.mark.parametrize("rows", [1, 4])
def test_decoding_copies_no_buffer(tiny, rows):
    """Keys and values are updated in place: a copy of one layer's buffer would be half of them
    all.
    """
    engine = random_engine(tiny, seed=1)
    engine.config = replace(engine.config, max_context_length=8192)
    batch = BatchEngine(engine, rows, admission=1 << 30)
    for row in range(rows):
        batch.submit([1 + row] * 1200, max_tokens=70, ignore_eos=True)
    for _ in range(10):
        batch.step()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    for _ in range(40):
        batch.step()
    grown = mx.get_peak_memory() - held
    batch.close()
    assert grown < (held - mx.get_active_memory()) / 10


def test_closing_anywhere_frees_the_memory_and_leaves_the_engine_usable(tiny):
    engine = random_engine(tiny, seed=1)
    wanted = [e.token for e in stream_generate(engine, PROMPT, max_tokens=12, ignore_eos=True)]
    list(
        stream_generate(engine, PROMPT, max_tokens=3, draft=engine, ignore_eos=True)
    )  # traces of speculation
    mx.clear_cache()
    before = mx.get_active_memory()
    for stop in range(12):
        for settings in ({}, {"draft": engine}, {"prompt_lookup": 1}):
            stream = stream_generate(engine, PROMPT, max_tokens=12, ignore_eos=True, **settings)
            assert [next(stream).token for _ in range(stop)] == wanted[:stop]
            stream.close()
    assert mx.get_active_memory() <= before + 4096
    assert [
        e.token for e in stream_generate(engine, PROMPT, max_tokens=12, ignore_eos=True)
    ] == wanted


def test_an_interrupt_while_waiting_for_a_token_leaves_a_true_cache(tiny, monkeypatch):
    engine, cache = random_engine(tiny, seed=1), PromptCache()
    stream = stream_generate(engine, PROMPT, max_tokens=30, ignore_eos=True, prompt_cache=cache)
    seen = [next(stream).token for _ in range(4)]
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(mx.array, "tolist", interrupted)
        next(stream)
    assert cache.tokens == PROMPT + seen[:-1]  # the latest may have been fed, or not
    rest = [
        e.token
        for e in stream_generate(
            engine, PROMPT + seen, max_tokens=5, ignore_eos=True, prompt_cache=cache
        )
    ]
    assert seen + rest == [
        e.token for e in stream_generate(engine, PROMPT, max_tokens=9, ignore_eos=True)
    ]


@pytest.mark.parametrize(
    "settings", [{}, {"prompt_lookup": 1, "adaptive_draft": False}, {"logprobs": 1}]
)
def test_a_batch_goes_on_after_an_interrupt_while_waiting(tiny, monkeypatch, settings):
    engine = random_engine(tiny, seed=1)
    wanted = [e.token for e in stream_generate(engine, PROMPT, max_tokens=12, ignore_eos=True)]
    batch, found = BatchEngine(engine, 2), {}
    for _ in range(2):
        found[batch.submit(PROMPT, max_tokens=12, ignore_eos=True, **settings)] = []
    while batch.busy:
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(mx.array, "tolist", interrupted)
            for number, event in batch.step():
                found[number].append(event.token)
            raise KeyboardInterrupt  # this step only prefilled
        for number, event in batch.step():
            found[number].append(event.token)
    assert list(found.values()) == [wanted, wanted]


def interrupted(array):
    raise KeyboardInterrupt


def interrupted_at(engine, layer, run):
    """`run()` until this layer is called; KeyboardInterrupt there, once."""
    kind, wanted = type(engine.model.layers[layer]), engine.model.layers[layer]
    whole = kind.__call__

    def call(self, *arguments):
        if self is wanted:
            raise KeyboardInterrupt
        return whole(self, *arguments)

    kind.__call__ = call
    try:
        with pytest.raises(KeyboardInterrupt):
            run()
    finally:
        kind.__call__ = whole


@pytest.mark.parametrize("kind", [{}, {"kv_bits": 8}, {"kv_window": 24}], ids=str)
@pytest.mark.parametrize("held", [0, 40])
@pytest.mark.parametrize("drafting", [False, True])
def test_an_interrupt_amid_a_pass_leaves_a_true_cache(tiny, kind, held, drafting):
    """Layers before the interrupted one are a prompt and a block of slots ahead of those behind
    it.
    """
    engine, draft = random_engine(tiny, seed=1), random_engine(tiny, seed=2)
    settings = {"max_tokens": 8, "ignore_eos": True, "prefill_chunk": 300, **kind}
    cache, kept = PromptCache(), ModelDraft(engine, draft)
    begun = [(7 * i * i + 3 * i) % 64 for i in range(40)]

    def tokens(prompt, **more):
        return [event.token for event in stream_generate(engine, prompt, **settings, **more)]

    if held:
        tokens(begun, prompt_cache=cache, draft=kept)
    for longer in (begun[:20] + PROMPT * 50, begun + PROMPT):
        interrupted_at(
            draft if drafting else engine,
            1,
            lambda longer=longer: tokens(longer, prompt_cache=cache, draft=kept),
        )
        for prompt in (begun[:20] + [5, 6], begun[:20] + PROMPT * 2, begun):
            assert tokens(prompt, prompt_cache=cache, draft=kept) == tokens(prompt)
    assert tokens(begun, prompt_cache=cache) == tokens(begun)


@pytest.mark.parametrize(
    "name",
    [
        "layers.0.attn.q_norm.weight",
        "layers.1.attn.k_norm.weight",
        "layers.1.ffn.proj_1.weight",
        "norm.weight",
        "token_embeddings.weight",
    ],
)
def test_new_weights_count_from_the_next_generation_on(tiny, name):
    changed = f"transformer.{name}"
    engine = random_engine(tiny, seed=1)
    list(stream_generate(engine, PROMPT, max_tokens=2, draft=engine))
    before = [e.token for e in stream_generate(engine, PROMPT, max_tokens=20, ignore_eos=True)]
    weights = parameters(engine.model)
    new = weights[changed] * mx.random.uniform(
        0.2, 3.0, weights[changed].shape, key=mx.random.key(3)
    )
    engine.model.load_weights([(changed, new)], strict=False)
    fresh = random_engine(tiny, seed=1)
    fresh.model.load_weights([(changed, new)], strict=False)
    for settings in ({"compiled": False}, {}, {"draft": engine}):
        found, wanted = (
            [
                e.token
                for e in stream_generate(one, PROMPT, max_tokens=20, ignore_eos=True, **settings)
            ]
            for one in (engine, fresh)
        )
        assert found == wanted != before
    (batched,) = batch_generate(engine, [PROMPT], max_tokens=20, ignore_eos=True)
    assert list(batched.tokens) == wanted


def test_the_steps_used_last_are_kept(tiny, monkeypatch):
    steps = random_engine(tiny, seed=1).steps
    monkeypatch.setattr(steps, "LIMIT", 2)
    made = [steps.cached(key, False, object) for key in "aba"]
    assert made[2] is made[0]
    steps.cached("c", False, object)
    assert (
        steps.cached("a", False, object) is made[0]
        and steps.cached("b", False, object) is not made[1]
    )
