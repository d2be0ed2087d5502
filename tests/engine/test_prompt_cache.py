"""The store of sequences that were run: what it finds, keeps and drops, against a naive one; and
its files.
"""

from __future__ import annotations

import gc
import random

import pytest
from held_text import HELD, ids_of
from sequences import EIGHT, PLAIN, TOKENS, WINDOW, generated, next_logits, ran, written
from small import random_engine

from openelm_mlx import BatchEngine, PromptCache, stream_generate
from openelm_mlx.device import mx
from openelm_mlx.engine.prompt_cache import common_prefix
from openelm_mlx.errors import CacheError, PromptError
from openelm_mlx.model.cache import KVCache
from openelm_mlx.model.cache_kinds import SLACK, CacheKind
from openelm_mlx.model.config import layer_shapes
from openelm_mlx.model.decoder import parameters

ONE, OTHER = object(), object()  # what stands for weights


@pytest.fixture(scope="module")
def engine(tiny):
    return random_engine(tiny, seed=1)


def read(cache, count):
    """The tokens that such a cache holds; all layers, keys and values agree."""
    rows = [array[..., :count, :].swapaxes(-1, -2).reshape(-1, count) for (array,) in cache.arrays]
    rows = mx.concatenate(rows)
    assert (rows == rows[:1]).all().item()
    return rows[0].astype(mx.int32).tolist()


class Naive:
    """The same store over plain lists: (who, tokens, bytes), the least recently used first."""

    def __init__(self, max_bytes):
        self.max_bytes, self.entries = max_bytes, []

    def take(self, who, tokens):
        best = None
        for index, (whose, held, _) in enumerate(self.entries):
            count = 0
            while count < min(len(held), len(tokens) - 1) and held[count] == tokens[count]:
                count += 1
            rank = count, count == len(held)
            if whose == who and rank >= (1, True) and (best is None or rank >= best[:2]):
                best = *rank, index
        if best is None:
            return 0
        entry = self.entries.pop(best[2])
        if not best[1]:
            self.entries.append(entry)
        return best[0]

    def put(self, who, tokens, size):
        self.entries = [e for e in self.entries if e[0] != who or tokens[: len(e[1])] != e[1]] + [
            (who, tokens, size)
        ]
        while sum(e[2] for e in self.entries) > self.max_bytes and len(self.entries) > 1:
            del self.entries[0]


def test_a_store_equals_a_naive_one_over_random_sequences(engine):
    """Longest prefix, order of use, budget; owners, kinds and weights apart; and the arrays are
    those of the tokens.
    """
    R = random.Random(5)
    slot = (
        sum(2 * shape.kv_heads for shape in layer_shapes(engine.config))
        * engine.config.head_dim
        * 4
    )
    store, naive, shared = PromptCache(60 * slot), Naive(60 * slot), 0
    for _ in range(600):
        weights, owner = R.choice([ONE, ONE, ONE, OTHER]), R.choice(["", "", "anna"])
        who, tokens = (id(weights), owner), [R.randrange(2) for _ in range(R.randint(1, 12))]
        took = store.take(weights, PLAIN, tokens, owner)
        count = naive.take(who, tokens)
        assert (took[1] if took else 0) == count
        if took is not None:
            assert took[0].offset == count and read(took[0], count) == tokens[:count]
            shared += count
        if R.random() < 0.7:
            cache = written(engine, tokens)
            store.put(weights, tokens, cache, owner)
            naive.put(who, tokens, cache.nbytes)
        assert len(store) == len(naive.entries) and store.tokens == (
            naive.entries[-1][1] if naive.entries else []
        )
        assert store.nbytes == sum(entry[2] for entry in naive.entries) <= 60 * slot
    assert shared > 500
    store.clear()
    assert (len(store), store.nbytes, store.tokens, store.take(ONE, PLAIN, [0, 1])) == (
        0,
        0,
        [],
        None,
    )


@pytest.mark.parametrize(
    "strange",
    [{"weights": OTHER}, {"kind": EIGHT}, {"owner": "ben"}],
    ids=lambda one: next(iter(one)),
)
def test_an_entry_is_for_its_weights_its_kind_and_its_owner(engine, strange):
    store, whose = PromptCache(), {"weights": ONE, "kind": PLAIN, "owner": "anna"}
    store.put(ONE, TOKENS[:9], written(engine, TOKENS[:9]), "anna")
    assert store.take(tokens=TOKENS, **whose | strange) is None and len(store) == 1
    assert store.take(tokens=TOKENS, **whose)[1] == 9


def test_what_is_wholly_used_is_moved_and_what_is_partly_used_is_copied(engine):
    store, cache = PromptCache(), written(engine, TOKENS, room=1024)
    store.put(ONE, TOKENS, cache)
    mx.clear_cache()  # a buffer that is used again may be larger than what is asked of it
    before = mx.get_active_memory()
    part, count = store.take(ONE, PLAIN, [*TOKENS[:50], 5])
    mx.eval(part.arrays)
    assert part.nbytes <= cache.nbytes / 2
    assert (
        count == 50
        and part is not cache
        and store.tokens == TOKENS
        and read(part, 50) == TOKENS[:50]
    )
    assert mx.get_active_memory() - before == pytest.approx(part.nbytes, rel=0.1)
    before = mx.get_active_memory()
    assert store.take(ONE, PLAIN, TOKENS)[1] == 99  # all but one token of an entry: it stays
    assert store.take(ONE, PLAIN, [*TOKENS, 5])[0] is cache
    assert mx.get_active_memory() == before and (len(store), store.nbytes) == (0, 0)


def test_of_two_that_share_as_much_the_one_that_need_not_be_copied_is_taken(engine):
    store, short = PromptCache(), written(engine, [1, 5, 9])
    store.put(ONE, [1, 5, 9, 4, 2], written(engine, [1, 5, 9, 4, 2]))
    store.put(ONE, [1, 5, 9], short)
    assert store.take(ONE, PLAIN, [1, 5, 9, 8]) == (short, 3) and store.tokens == [1, 5, 9, 4, 2]


def test_an_entry_that_comes_in_the_midst_of_a_search_takes_no_other_ones_place(engine):
    class Meanwhile(str):
        """An owner that is compared while the collector closes another generation."""

        def __eq__(self, other):
            if coming:
                tokens = coming.pop()
                store.put(weights, tokens, written(engine, tokens))
            return other == ""

        __hash__ = str.__hash__

    store, weights, coming = PromptCache(), object(), [[1, 5, 9, 4, 6]]
    for tokens in ([1, 5, 9, 4], [1, 5, 9, 8, 7]):
        store.put(weights, tokens, written(engine, tokens))
    cache, reused = store.take(weights, PLAIN, [1, 5, 9, 8, 7, 3], Meanwhile())
    assert reused == 5 and read(cache, 5) == [1, 5, 9, 8, 7]
    assert len(store) == 1 and store.tokens == [1, 5, 9, 4, 6]


def test_the_latest_stays_whatever_it_takes(engine):
    store = PromptCache(max_bytes=0)
    for count in (9, 4):
        store.put(ONE, TOKENS[:count], written(engine, TOKENS[:count]))
        assert store.tokens == TOKENS[:count] and len(store) == 1
    store.put(ONE, [], KVCache(engine.config))  # nothing was run: there is nothing to keep
    assert store.tokens == TOKENS[:4]


def test_tokens_that_the_cache_does_not_hold_are_refused(engine):
    store = PromptCache()
    with pytest.raises(
        CacheError, match="the cache has 9 tokens, but 8 were given; give those of the cache"
    ):
        store.put(ONE, TOKENS[:8], written(engine, TOKENS[:9]))
    assert len(store) == 0


def test_a_window_that_has_forgotten_serves_no_earlier_text(engine):
    """Another entry may; and a shorter one is kept as long as the longer one cannot give it."""
    store, full = PromptCache(), WINDOW.layout.capacity
    store.put(ONE, TOKENS[:40], written(engine, TOKENS[:40], WINDOW))
    store.put(
        ONE, TOKENS[:full], written(engine, TOKENS[:full], WINDOW)
    )  # not yet run over: it can give everything
    assert len(store) == 1
    store.put(ONE, TOKENS[:90], written(engine, TOKENS[:90], WINDOW))
    assert len(store) == 2
    assert store.take(ONE, WINDOW, [*TOKENS[:55], 5])[1] == full  # the shorter one, wholly
    assert store.take(ONE, WINDOW, [*TOKENS[:50], 5]) is None and len(store) == 1
    assert store.take(ONE, WINDOW, [*TOKENS[: 90 - SLACK], 5])[1] == 90 - SLACK


@pytest.mark.parametrize("kind", [PLAIN, EIGHT, WINDOW], ids=str)
def test_what_was_taken_goes_on_as_the_whole_text(engine, kind):
    store = ran(engine, TOKENS[:60], kind)
    for text in ([*TOKENS[:55], 7, 8], [*TOKENS[:60], 5, 6]):  # a copy, then the entry itself
        took, count = store.take(engine.steps.refresh(), kind, text)
        wanted = next_logits(engine, text, KVCache(engine.config, kind))
        distance = mx.abs(next_logits(engine, text[count:], took) - wanted).max().item()
        assert count >= 55 and distance < (0.1 if kind == EIGHT else 1e-4)


@pytest.mark.parametrize("held, prompt, dropped", HELD)
def test_text_goes_on_from_the_held_tokens_that_spell_its_beginning(
    tiny, engine, held, prompt, dropped
):
    store, tokenizer, ids = PromptCache(), tiny.tokenizer, ids_of(tiny.tokenizer, held)
    other = ids_of(tiny.tokenizer, ("On", "ce up", "ward"))  # shares less
    for tokens in (ids, other, other[:2]):
        store.put(ONE, tokens, written(engine, tokens))
    found = store.ids_for(tokenizer, prompt, ONE, PLAIN)
    assert common_prefix(found, ids) == len(ids) - dropped and tokenizer.decode(found) == prompt
    assert found != tokenizer.encode(prompt) or held[0] == "Once "
    assert store.ids_for(tokenizer, "Another text", ONE, PLAIN) == tokenizer.encode("Another text")
    store.put(OTHER, ids[1:], written(engine, ids[1:]))  # what has no start token begins no text
    for strange in ((OTHER, PLAIN), (ONE, EIGHT), (ONE, PLAIN, "anna")):
        assert store.ids_for(tokenizer, prompt, *strange) == tokenizer.encode(prompt)


def test_text_goes_on_from_half_a_character(tiny, engine):
    store, tokenizer = PromptCache(), tiny.tokenizer
    ids = tokenizer.encode("A 🦙")[:-2]
    store.put(ONE, ids, written(engine, ids))
    shown = tokenizer.decode(ids)
    assert shown.endswith("\ufffd")
    found = store.ids_for(tokenizer, shown + " is", ONE, PLAIN)
    assert found[: len(ids)] == ids and tokenizer.decode(found) == shown + " is"
    assert store.ids_for(tokenizer, "A 🦙 is", ONE, PLAIN) == tokenizer.encode("A 🦙 is")
    with pytest.raises(PromptError, match="not valid UTF-8"):
        store.ids_for(tokenizer, "\ud800", ONE, PLAIN)


def test_generations_of_every_kind_share_a_store_and_say_what_they_say_alone(engine):
    store, reused = PromptCache(), {}
    for kind in ({}, {"kv_bits": 8}, {"kv_window": 24}):
        for prompt in (TOKENS, TOKENS[:40], [*TOKENS[:45], 7], [*TOKENS[:40], 9, 9], TOKENS):
            found, count = generated(engine, prompt, store, **kind)
            assert found == generated(engine, prompt, **kind)[0]
            reused.setdefault(str(kind), []).append(count)
    full = [0, 39, 45, 40, 99]
    assert list(reused.values())[:2] == [full, full]
    assert (
        reused["{'kv_window': 24}"][1] == 0 and reused["{'kv_window': 24}"][4] > 39
    )  # it had to begin anew


def test_weights_that_changed_find_nothing_of_before(tiny, engine):
    store, other = PromptCache(), random_engine(tiny, seed=2)
    generated(engine, TOKENS[:20], store)
    assert generated(other, TOKENS[:20], store) == generated(other, TOKENS[:20])
    weight = other.model.layers[0].ffn.proj_1
    weight.weight = weight.weight * 1.5
    assert generated(other, TOKENS[:20], store) == generated(other, TOKENS[:20])
    assert generated(engine, TOKENS[:21], store)[1] == 20


def test_a_generation_that_was_let_go_disturbs_no_other(engine):
    """It is collected amid the prefill of another one, and gives its cache back then."""
    store = PromptCache()
    wanted = generated(engine, TOKENS[::-1])[0]

    class Client:
        def __init__(self):
            self.events, self.myself = (
                stream_generate(engine, TOKENS, prompt_cache=store, max_tokens=20),
                self,
            )

    next(Client().events)
    counts = []

    def progress(done, total):
        gc.collect()
        counts.append(len(store))

    assert generated(engine, TOKENS[::-1], store, prefill_chunk=16, progress=progress)[0] == wanted
    assert counts[-1] == 1 and len(store) == 2 and generated(engine, [*TOKENS, 5], store)[1] == 100


def test_a_batch_keeps_owners_apart(tiny, engine):
    """Also where they ask the same at the same time, and where text goes on from held tokens."""
    store = PromptCache()
    batch = BatchEngine(engine, 4, prompt_cache=store, admission=1 << 30)
    for owner in ("one", "other", "one"):
        batch.submit(TOKENS[:30], owner=owner, max_tokens=1)
    events = [event for _ in range(2) for _, event in batch.step()]
    assert [event.stats.reused_tokens for event in events] == [0, 0, 30]
    encode = tiny.tokenizer.encode
    letters = [
        1,
        *(token for letter in "Once" for token in encode(letter, bos=False, continued=True)),
    ]
    batch = BatchEngine(tiny, 1, prompt_cache=store)
    batch.submit(letters, owner="one", max_tokens=1)
    batch.step()
    for owner, begun in (("one", letters), ("other", encode("Once"))):
        batch.submit("Once upon", owner=owner, max_tokens=1, continued=True)
        while batch.busy:
            batch.step()
        assert store.tokens == [*begun, *encode("Once upon")[len(encode("Once")) :]]


def test_what_a_short_answer_leaves_has_no_empty_block(engine):
    """The block that a single row ran in is free for the next one."""
    store = PromptCache()
    generated(engine, TOKENS[:20], store)
    (entry,) = store._entries
    assert entry.cache.capacity == len(entry.tokens) < 128
    again = generated(engine, [*entry.tokens, 7], store)
    assert again == (generated(engine, [*entry.tokens, 7])[0], len(entry.tokens))


def test_what_began_with_other_weights_is_not_found(tiny):
    engine, store, name = (
        random_engine(tiny, seed=1),
        PromptCache(),
        "transformer.layers.1.ffn.proj_1.weight",
    )
    batch = BatchEngine(engine, 2, prompt_cache=store)
    batch.submit(TOKENS[:20], max_tokens=9, ignore_eos=True)
    batch.step(), batch.step()
    engine.model.load_weights([(name, parameters(engine.model)[name] * 2)], strict=False)
    batch.submit(TOKENS[20:29], max_tokens=2, ignore_eos=True)
    while batch.busy:
        batch.step()
    weights = engine.steps.refresh()
    assert store.take(weights, CacheKind(), TOKENS[:20]) is None
    assert store.take(weights, CacheKind(), TOKENS[20:29]) is not None
