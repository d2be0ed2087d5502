"""Log-likelihoods of continuations: the same as by a pass of the model for each of them alone."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from unittest.mock import patch

import pytest
from golden_set import load_golden
from hypothesis import given, settings
from hypothesis import strategies as st
from small import merged_model, random_adapter, random_engine

from openelm_mlx.device import mx
from openelm_mlx.engine.loading import Engine
from openelm_mlx.errors import OptionError, PromptError
from openelm_mlx.evaluate import plan as planning
from openelm_mlx.evaluate import score as scoring
from openelm_mlx.evaluate.plan import Request, plan
from openelm_mlx.evaluate.run import answers
from openelm_mlx.evaluate.score import Answer, Scorer

FEW = settings(max_examples=20, deadline=None, derandomize=True, database=None)


def alone(engine: Engine, request: Request) -> Answer:
    """The answer by a float32 pass over this request's tokens and nothing else."""
    logits = engine.model(mx.array([request.fed]))[0, len(request.context) - 1 :, : engine.vocab]
    logp = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    scores = [logp[at, token].item() for at, token in enumerate(request.continuation)]
    return Answer(sum(scores), tuple(logits.argmax(axis=-1).tolist()) == request.continuation)


def assert_as_alone(engine: Engine, asked: Sequence[Request], batch_tokens: int) -> None:
    found = answers(engine, asked, batch_tokens=batch_tokens)
    for answer, request in zip(found, asked, strict=True):
        logprob, greedy = alone(engine, request)
        assert answer.logprob == pytest.approx(logprob, abs=1e-4) and answer.greedy == greedy


def greedy_continuation(engine: Engine, context: tuple[int, ...], count: int) -> tuple[int, ...]:
    """The tokens that greedy decoding adds to a context."""
    done = context
    for _ in range(count):
        done += (engine.model(mx.array([done]))[0, -1, : engine.vocab].argmax().item(),)
    return done[len(context) :]


def texts(least: int, most: int):
    """Few different tokens, so that many texts begin alike."""
    return st.lists(st.sampled_from((3, 4, 40)), min_size=least, max_size=most).map(tuple)


@FEW
@given(
    st.lists(st.builds(Request, texts(1, 20), texts(1, 6)), min_size=1, max_size=10),
    st.sampled_from((1, 16, 40, 4096)),
    st.integers(2, 9),
    st.randoms(use_true_random=False),
)
def test_answers_are_those_of_each_request_alone(small, asked, batch_tokens, shortest, rng):
    asked = [one._replace(context=(1, 5, 7, *one.context)) for one in asked]
    asked += [Request(one.context, greedy_continuation(small, one.context, 2)) for one in asked[:2]]
    rng.shuffle(asked)
    with patch.multiple(planning, SHORTEST=shortest, WORTH=shortest):
        assert_as_alone(small, asked, batch_tokens)


def test_questions_after_shared_examples(small):
    rng = random.Random(1)

    def words(least: int, most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, small.vocab) for _ in range(rng.randint(least, most)))

    asked, examples = [], (1, *words(90, 90))
    for number in range(16):
        context = (examples if number % 4 else (1,)) + words(10, 30)
        asked += [Request(context, words(1, 6)) for _ in range(3)]
    for batch_tokens, prefixes in ((256, {0, 91}), (4096, {0})):  # many short rows, or one long one
        assert {work.prefix for work in plan(asked, batch_tokens)} == prefixes
        assert_as_alone(small, asked, batch_tokens)
    # as where a GPU's memory or display wants shorter work
    with (
        patch.multiple(scoring, chunk_for=lambda *_: 40, layers_at_once=lambda *_: 1),
        patch.object(mx, "eval", wraps=mx.eval) as evaluated,
    ):
        assert_as_alone(small, asked, 256)
    assert evaluated.call_count >= len(plan(asked, 256)) * (small.config.num_transformer_layers - 1)


def test_the_bundled_model(tiny):
    encode, words = tiny.tokenizer.encode, ("king", "queen", "old woman", "frog in the well")
    asked = [
        Request(tuple(encode(text)), tuple(encode(f" {word}", bos=False)))
        for text in ("Once upon a time there was a", "Then the")
        for word in words
    ]
    assert_as_alone(tiny, asked, 4096)


@pytest.mark.parametrize("name", ["tied-gqa4", "noqknorm-gqa2", "noglu-gqa2", "openelm-nano"])
def test_answers_follow_from_the_logits_of_the_reference(tiny, name, tmp_path):
    model, tokens, expected = load_golden(name, tmp_path)
    engine = Engine(model, tiny.tokenizer, model.args, name, tmp_path)
    logits = mx.array(expected)[..., : engine.vocab]
    logp, likeliest = logits - mx.logsumexp(logits, axis=-1, keepdims=True), logits.argmax(axis=-1)
    cuts = ((1, 9, 40), (8, 9, 50), (8, 9, 60), (8, 20, 70), (12, 20, 80))

    def assert_as_the_reference(cuts: Sequence[tuple[int, int, int]], prefixes: set[int]) -> None:
        texts = [(row, text, cut) for row, text in enumerate(tokens.tolist()) for cut in cuts]
        asked = [
            Request(tuple(t[:start]), (*t[start:stop], last)) for _, t, (start, stop, last) in texts
        ]
        assert {work.prefix for work in plan(asked, 8)} == prefixes
        found = answers(engine, asked, batch_tokens=8)
        for answer, request, (row, _, (start, stop, _)) in zip(found, asked, texts, strict=True):
            targets = mx.array(request.continuation)
            scores = logp[row, mx.arange(start - 1, stop), targets]
            assert answer.logprob == pytest.approx(scores.sum().item(), abs=1e-4)
            assert answer.greedy == (likeliest[row, start - 1 : stop] == targets).all().item()

    with patch.multiple(planning, SHORTEST=4, WIDTH=33):  # so that 20 tokens are too long
        assert_as_the_reference(cuts, {0, 7})  # the first one wants the state of the first token
        assert_as_the_reference(cuts[1:], {7})


def test_an_adapter_answers_as_the_merged_model(small):
    small.load_adapter(random_adapter(small.model, 2, dora=True), "one")
    model = merged_model(small.model, small.adapters["one"].adapter)
    merged = Engine(model, small.tokenizer, small.config, "merged", small.path)
    asked = [Request((1, 9, *range(3, 3 + n)), (5, n + 6)) for n in (2, 2, 3, 8, 8)]
    found = answers(small.adapted("one"), asked)
    for answer, request in zip(found, asked, strict=True):
        assert answer.logprob == pytest.approx(alone(merged, request).logprob, abs=1e-3)
        assert abs(answer.logprob - alone(small, request).logprob) > 0.1


def test_passes_may_come_in_any_order(small):
    asked = [Request((1, *range(3, 3 + 8 * (1 + n % 2)), 40 + n), (5, n + 6, 7)) for n in range(16)]
    with patch.multiple(planning, SHORTEST=4, WORTH=4):
        passes = plan(asked, 16)
    assert {work.prefix for work in passes} >= {9, 17}
    scorer, again = Scorer(small), Scorer(small)
    found = {work: scorer.run(asked, work) for work in passes}
    assert {work: again.run(asked, work) for work in reversed(passes)} == found


def test_an_id_that_is_never_drawn_has_no_probability(tiny):
    engine = random_engine(tiny, 3, vocab=tiny.tokenizer.vocab_size + 8)
    drawn, never, later = answers(
        engine,
        [Request((1, 5), (6,)), Request((1, 5), (engine.vocab,)), Request((1, engine.vocab), (6,))],
    )
    assert never == Answer(-math.inf, False)
    assert math.isfinite(drawn.logprob) and math.isfinite(later.logprob)


def test_refused_before_any_work(small):
    good, most = Request((1, 5), (6,)), small.config.max_context_length
    for wrong, message in (
        (Request((), (6,)), "request 2: the context is empty; give at least one token"),
        (Request((1,), ()), "request 2: the continuation is empty; give at least one token"),
        (Request((1,), (64,)), "request 2: token id 64 is outside the vocabulary of 64"),
        (Request((-1,), (4,)), "request 2: token id -1 is outside the vocabulary of 64"),
        (
            Request((1,) * most, (5, 6)),
            "request 2: the model is fed 513 tokens; its context is 512. Shorten the context",
        ),
    ):
        with pytest.raises(PromptError, match=message):
            answers(small, [good, wrong])
    assert math.isfinite(answers(small, [Request((1,) * most, (5,))])[0].logprob)
    with pytest.raises(OptionError, match="batch_tokens is 0; allowed is a whole number from 1 up"):
        answers(small, [good], batch_tokens=0)
    with pytest.raises(OptionError, match="engine is 'openelm-tiny'; allowed is a loaded model"):
        answers("openelm-tiny", [good])
    assert answers(small, []) == []
