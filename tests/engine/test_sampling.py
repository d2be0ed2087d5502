"""Sampling: every filter against plain arithmetic in float64, rows in a batch against each alone,
draws against chance.
"""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest

from openelm_mlx.device import mx
from openelm_mlx.engine.decode import logprobs
from openelm_mlx.engine.options import SamplingOptions
from openelm_mlx.engine.sampling import (
    Context,
    Controls,
    Filters,
    History,
    coin,
    draw,
    filter_logits,
    gumbel,
    seed_key,
)
from openelm_mlx.errors import OptionError

VOCAB = 100  # more than the shorter list of top-k holds
NEWEST = mx.array([0])


class Row:
    """One sequence at one position, with all that its next token depends on; drawn from alone or in
    a batch.
    """

    def __init__(
        self,
        logits: Any,
        options: SamplingOptions,
        prompt: Any = (),
        answer: Any = (),
        position: int = 7,
        allowed: Any = None,
    ) -> None:
        self.logits = np.asarray(logits, np.float32)
        self.options, self.prompt, self.answer, self.position = (
            options,
            [*map(int, prompt)],
            [*map(int, answer)],
            position,
        )
        self.allowed = np.ones(len(self.logits), bool) if allowed is None else np.asarray(allowed)
        self.key = seed_key(options.seed or 0)


def inputs(rows: list[Row], masked: bool = False) -> tuple[mx.array, Filters, Context]:
    """What `draw` and `filter_logits` take for these rows; histories go through `plus`, as in
    generation.
    """
    options, vocab = [row.options for row in rows], len(rows[0].logits)
    filters = Filters.of(options, masked)
    histories = []
    for row in rows:
        history = History.of(row.prompt, row.answer[:1], row.options.penalty_window, filters, vocab)
        for token in row.answer[1:]:
            history = history and history.plus(mx.array([token], mx.uint32))
        histories.append(history)
    history = None
    if histories[0] is not None:
        history = History(
            *(
                None if parts[0] is None else mx.concatenate(parts)
                for parts in zip(*histories, strict=True)
            )
        )
    words = np.zeros((len(rows), -(-vocab // 32) * 32), np.uint32)
    words[:, :vocab] = [row.allowed for row in rows]
    mask = (words.reshape(len(rows), -1, 32) << np.arange(32, dtype=np.uint32)).sum(
        -1, dtype=np.uint32
    )
    context = Context(
        Controls.of(options, filters, vocab),
        mx.concatenate([row.key for row in rows]),
        mx.array([row.position for row in rows]),
        mx.array([(row.prompt + row.answer or [0])[-1] for row in rows]),
        history,
        mx.array(mask) if masked else None,
    )
    return mx.array(np.stack([row.logits for row in rows])), filters, context


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def reference(row: Row) -> np.ndarray:
    """The distribution of the next token, in the plainest way there is."""
    o, x = row.options, row.logits.astype(np.float64)
    vocab = len(x)
    if o.processor is not None:
        x = np.array(o.processor(mx.array(row.logits[None]), NEWEST, mx.array([row.position])))[
            0
        ].astype(np.float64)
    for token, bias in dict(o.logit_bias).items():
        x[token] += bias
    x[~row.allowed] = -np.inf
    text = [(token, False) for token in row.prompt] + [(token, True) for token in row.answer]
    text = text[len(text) - o.penalty_window :] if 0 < o.penalty_window < len(text) else text
    for token in {token for token, _ in text}:
        x[token] = (
            x[token] / o.repetition_penalty if x[token] > 0 else x[token] * o.repetition_penalty
        )
    for token in {token for token, drawn in text if drawn}:
        x[token] -= o.presence_penalty + o.frequency_penalty * text.count((token, True))
    ranking = sorted(range(vocab), key=lambda token: (-x[token], token))
    p = np.zeros(vocab)
    if o.greedy:
        p[ranking[0]] = 1
        return p
    p = softmax(x / o.temperature)
    stay = ranking[: o.top_k or vocab]
    p[[token for token in range(vocab) if token not in stay]] = 0
    p /= p.sum()
    mass, stay = 0.0, []
    for token in ranking:
        if mass < o.top_p or o.top_p == 1 or not stay:
            stay.append(token)
        mass += p[token]
    p[[token for token in range(vocab) if token not in stay]] = 0
    p[p < o.min_p * p.max()] = 0
    p /= p.sum()
    likely = [token for token in range(vocab) if p[token] >= o.xtc_threshold]
    if likely and coin(row.key, mx.array([row.position])).item() < o.xtc_probability:
        p[[token for token in likely if p[token] > min(p[likely])]] = 0
    return p / p.sum()


def distributions(rows: list[Row], masked: bool = False) -> np.ndarray:
    return np.array(mx.softmax(filter_logits(*inputs(rows, masked)), axis=-1))


LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -3.0]


def kept(logits: Any = LOGITS, **options: Any) -> list[bool]:
    return (distributions([Row(logits, SamplingOptions(**options))])[0] > 0).tolist()


def test_each_filter_against_plain_arithmetic():
    p = softmax(np.array(LOGITS))
    assert kept(temperature=1.0) == [True] * 6
    assert kept(temperature=1.0, top_k=2) == [True, True] + [False] * 4
    assert kept(temperature=1.0, top_k=6) == kept(temperature=1.0, top_k=10**12) == [True] * 6
    assert kept(temperature=1.0, top_p=0.8) == ((np.cumsum(p) - p) < 0.8).tolist()
    assert kept(temperature=1.0, top_p=0.0) == [True] + [False] * 5
    assert kept(temperature=1.0, min_p=0.2) == (p >= 0.2 * p.max()).tolist()
    assert kept() == kept(min_p=1.0, temperature=1.0) == [True] + [False] * 5
    warm = np.array(filter_logits(*inputs([Row(LOGITS, SamplingOptions(temperature=2.0))])))[0]
    assert np.allclose(warm, (np.array(LOGITS) - 2.0) / 2)


def test_filters_see_the_tempered_distribution_one_after_the_other():
    p = softmax(np.array(LOGITS) / 2)
    likeliest = ((np.cumsum(p) - p) < 0.6).tolist()
    assert kept(temperature=2.0, top_p=0.6) == likeliest != kept(temperature=1.0, top_p=0.6)
    likely = (p >= 0.4 * p.max()).tolist()
    assert kept(temperature=2.0, min_p=0.4) == likely != kept(temperature=1.0, min_p=0.4)
    three = softmax(np.array(LOGITS[:3]) / 2)  # top-p counts in what top-k has left
    of_three = ((np.cumsum(three) - three) < 0.8).tolist() + [False] * 3
    assert kept(temperature=2.0, top_k=3, top_p=0.8) == of_three != kept(temperature=2.0, top_p=0.8)


def test_top_choices_are_excluded_but_the_least_likely_of_them():
    p = softmax(np.array(LOGITS))
    assert sum(p >= 0.1) == 3
    assert kept(temperature=1.0, xtc_probability=1.0) == [False, False] + [True] * 4
    assert (
        kept(temperature=1.0, xtc_probability=1.0, xtc_threshold=0.5) == [True] * 6
    )  # one alone is the least likely
    assert kept(temperature=1.0, xtc_probability=1.0, top_k=2) == [False, True] + [False] * 4
    assert kept([1, 1, 0, 0], temperature=1.0, xtc_probability=1.0, xtc_threshold=0.2) == [
        True,
        True,
        True,
        True,
    ]
    assert kept(temperature=1.0, xtc_probability=1.0, xtc_threshold=0.2) == [False] + [True] * 5
    options = SamplingOptions(temperature=1.0, xtc_probability=0.3)
    rows = [Row(LOGITS, options, position=position) for position in range(2000)]
    excluded = (distributions(rows)[:, 0] == 0).sum()
    assert abs(excluded - 600) < 4 * math.sqrt(2000 * 0.3 * 0.7)


@pytest.mark.parametrize("settings", [{"top_k": 5}, {"top_k": 5, "top_p": 0.99}, {"top_p": 0.5}])
def test_equal_scores_are_kept_by_their_ids(settings):
    """Logits of half precision are often equal; top-k keeps exactly k of them nevertheless."""
    logits = (
        mx.array(np.random.default_rng(3).normal(size=(40, 500)) * 2)
        .astype(mx.bfloat16)
        .astype(mx.float32)
    )
    rows = [
        Row(np.round(np.array(row)), SamplingOptions(temperature=1.0, **settings)) for row in logits
    ]
    expected = np.stack([reference(row) for row in rows])
    found = distributions(rows)
    assert ((found > 0) == (expected > 0)).all() and np.allclose(found, expected, atol=1e-6)
    if settings == {"top_k": 5}:
        assert ((found > 0).sum(axis=1) == 5).all()
        assert any((np.sort(row.logits)[-6] == np.sort(row.logits)[-5]) for row in rows)


def test_penalties():
    options = SamplingOptions(
        temperature=1.0, repetition_penalty=2.0, presence_penalty=0.5, frequency_penalty=0.25
    )
    got = np.array(filter_logits(*inputs([Row(LOGITS, options, [0, 4], [1, 1])])))[0]
    expected = np.array([1.0, 0.5 - 0.5 - 0.5, 0.5, 0.0, -2.0, -3.0])
    assert np.allclose(got - got[0], expected - expected[0])


def test_penalties_of_a_window_forget_what_has_left_it():
    filters = Filters.of(
        [SamplingOptions(penalty_window=5, repetition_penalty=1.1, frequency_penalty=1.0)]
    )
    assert filters.window == 8
    rng = np.random.default_rng(0)
    for window in (0, 1, 2, 5, 8):
        options = SamplingOptions(
            penalty_window=window, repetition_penalty=1.1, frequency_penalty=1.0
        )
        prompt, answer = rng.integers(0, 6, 3).tolist(), []
        history = History.of(prompt, answer, options.penalty_window, filters, 6)
        for token in rng.integers(0, 6, 30).tolist():
            answer.append(token)
            history = history.plus(mx.array([token], mx.uint32))
            signed = [(token, False) for token in prompt] + [(token, True) for token in answer]
            counted = signed[-window:]
            assert history.text.tolist() == [
                [sum(known == token for known, _ in counted) for token in range(6)]
            ]
            assert history.answer.tolist() == [[counted.count((token, True)) for token in range(6)]]
            again = History.of(
                prompt, answer, options.penalty_window, filters, 6
            )  # as when rows come and go
            assert all((a == b).all().item() for a, b in zip(history, again, strict=True))


def test_tokens_that_exist_in_the_weights_only_are_no_part_of_a_history():
    options = SamplingOptions(repetition_penalty=1.1)
    history = History.of([1, 90, 1], [2], 0, Filters.of([options]), 4)
    assert history.text.tolist() == [[0, 2, 1, 0]] and history.answer is history.latest is None
    assert History.of([], [], 0, Filters.of([options]), 4).text.tolist() == [[0, 0, 0, 0]]
    assert History.of([1], [2], 0, Filters(), 4) is None


def likelier_later(logits: mx.array, newest: mx.array, positions: mx.array) -> mx.array:
    return logits + mx.arange(logits.shape[1]) * positions[:, None] / 40


def flatter(logits: mx.array, newest: mx.array, positions: mx.array) -> mx.array:
    return logits * 0.5


def random_rows(count: int, seed: int, masked: bool = False) -> list[Row]:
    """Rows in which every option is on or off by chance, greedy ones and extreme temperatures among
    them.
    """
    rng = np.random.default_rng(seed)

    def maybe(value: Any, off: Any, chance: float = 0.4) -> Any:
        return value if rng.random() < chance else off

    rows = []
    for _ in range(count):
        settings = {
            "temperature": float(rng.choice([0.0, 1e-9, 1e-5, 0.3, 0.7, 1.0, 1.5, 20.0, 100.0])),
            "top_k": maybe(int(rng.integers(1, rng.choice([60, VOCAB + 5]))), 0),
            "top_p": maybe(float(rng.random()), 1.0),
            "min_p": maybe(float(rng.random() ** 3), 0.0),
            "repetition_penalty": maybe(float(rng.uniform(0.5, 2)), 1.0),
            "presence_penalty": maybe(float(rng.normal()), 0.0),
            "frequency_penalty": maybe(float(rng.normal()), 0.0),
            "logit_bias": maybe(
                {int(t): float(rng.normal() * 5) for t in rng.integers(0, VOCAB, 4)}, {}
            ),
            "processor": maybe(rng.choice([likelier_later, flatter]), None),
            "seed": int(rng.integers(0, 2**40)),
        }
        if rng.random() < 0.5:
            settings |= {"xtc_probability": 0.5, "xtc_threshold": float(rng.uniform(0.01, 0.3))}
        if settings["repetition_penalty"] != 1.0:
            settings["penalty_window"] = maybe(int(rng.integers(1, 12)), 0)
        allowed = rng.random(VOCAB) < 0.5
        allowed[int(rng.integers(VOCAB))] = True
        rows.append(
            Row(
                rng.normal(size=VOCAB) * 2,
                SamplingOptions(**settings),
                rng.integers(0, VOCAB, 6),
                rng.integers(0, VOCAB, 9),
                int(rng.integers(1, 1000)),
                allowed if masked else None,
            )
        )
    return rows


@pytest.mark.parametrize("masked", [False, True])
def test_every_combination_of_filters_gives_the_documented_distribution(masked):
    rows = random_rows(200, seed=1, masked=masked)
    expected, found = np.stack([reference(row) for row in rows]), distributions(rows, masked)
    assert ((found > 1e-30) == (expected > 1e-30)).all()
    assert np.allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert (
        sum(row.options.greedy for row in rows) > 20 and len({(e > 0).sum() for e in expected}) > 20
    )


def drawn(rows: list[Row], compiled: bool = False) -> list[int]:
    logits, filters, context = inputs(rows, masked=any(not row.allowed.all() for row in rows))

    def step(logits: mx.array, context: Context) -> mx.array:
        return draw(logits, filters, context)

    return (mx.compile(step) if compiled else step)(logits, context).tolist()


def test_a_row_in_a_batch_draws_what_it_draws_alone():
    """200 sets of options in batches of 8: each row keeps the token of its own filters, whatever is
    on for others.
    """
    rows = random_rows(200, seed=2)
    rows[::5] = random_rows(40, seed=3, masked=True)
    alone = [drawn([row])[0] for row in rows]
    assert [
        token for start in range(0, 200, 8) for token in drawn(rows[start : start + 8])
    ] == alone
    assert drawn(rows[:3] + rows[7:9], compiled=True) == alone[:3] + alone[7:9]
    assert drawn(rows[:1], compiled=True) == alone[:1]


@pytest.mark.needs("a C++ compiler")
def test_new_values_of_the_same_filters_cost_no_trace():
    """100 settings of the sampler: the function is traced once for each combination of filters."""
    rng, traced, steps = np.random.default_rng(5), [], {}
    for _ in range(100):
        options = SamplingOptions(
            temperature=float(rng.uniform(0.1, 2)),
            seed=int(rng.integers(2**40)),
            top_p=float(rng.uniform(0.1, 0.9)),
            top_k=int(rng.choice([0, 2, 10, 60])),
            repetition_penalty=float(rng.uniform(1.1, 2)),
            penalty_window=int(rng.integers(5, 9)),
            presence_penalty=float(rng.normal()),
            logit_bias={int(rng.integers(VOCAB)): 1.0},
        )
        row = Row(rng.normal(size=VOCAB), options, [1, 2], [3])
        logits, filters, context = inputs([row])

        def step(logits: mx.array, context: Context, filters: Filters = filters) -> mx.array:
            traced.append(filters)
            return draw(logits, filters, context)

        token = steps.setdefault(filters, mx.compile(step))(logits, context).item()
        assert token == drawn([row])[0]
    assert len(traced) == len(steps) == len({*traced}) == 2


def test_draws_follow_the_distribution():
    n, options = 4000, SamplingOptions(temperature=1.0, top_k=4, seed=11)
    tokens = drawn([Row(LOGITS, options, position=position) for position in range(n)])
    counts = np.bincount(tokens, minlength=6)
    expected = softmax(np.array(LOGITS[:4])) * n
    assert counts[4:].sum() == 0
    assert (
        (counts[:4] - expected) ** 2 / expected
    ).sum() < 16.3  # chi-square, 3 degrees of freedom, p = 0.001


@pytest.mark.parametrize("seed", [0, 2**40 + 5])
def test_a_seed_fixes_the_draw_whatever_the_batch(seed):
    options = SamplingOptions(temperature=1.0, seed=seed, xtc_probability=0.5)
    rows = [Row(LOGITS, options, position=position) for position in range(20)]
    assert [drawn([row])[0] for row in rows] == drawn(rows)
    keys, positions = mx.concatenate([seed_key(seed)] * 20), mx.arange(20)
    noise, coins = gumbel(keys, positions, 6), coin(keys, positions)
    for place in range(20):
        assert (gumbel(seed_key(seed), mx.array([place]), 6)[0] == noise[place]).all().item()
        assert coin(seed_key(seed), mx.array([place])).item() == coins[place].item()


def test_a_greedy_choice_is_the_argmax_of_what_the_model_computed():
    logits = mx.array([[1.0, 3.0, 3.0, 2.0]], mx.bfloat16)
    assert (
        Filters.of([SamplingOptions(), SamplingOptions(top_k=1, temperature=2.0, top_p=0.5)])
        == Filters()
    )
    token = draw(logits, Filters(), Context(Controls(), seed_key(0), NEWEST, NEWEST))
    graph = io.StringIO()
    mx.export_to_dot(graph, token)
    assert graph.getvalue().count("shape=rectangle") == 2, graph.getvalue()  # ArgReduce and Squeeze
    assert token.item() == 1


def test_equal_scores_of_a_greedy_row_give_the_lower_id_beside_rows_that_sample():
    every = {"top_k": 5, "top_p": 0.5, "min_p": 0.9, "xtc_probability": 1.0}
    for logits in (
        [1, 2, 2, 0, 2],
        [-1e30, 1e-30, 1e-30, 0, -3e38],
        [-np.inf, 7e4, 7e4, -7e4, -np.inf],
    ):
        for others in ({}, every):
            options = [SamplingOptions(temperature=t, **others) for t in (0.0, 1e-7, 1.0)]
            rows = [Row(logits, o, position=place) for place in range(30) for o in options]
            tokens = drawn(rows)
            assert tokens[::3] == tokens[1::3] == [1] * 30
            assert [drawn([row])[0] for row in rows[:9]] == tokens[:9]


def test_extreme_temperatures_draw_like_any_other():
    for logits in (LOGITS, [3e38, 3e38, 1e38, -3e38, 0, 1], [0, -1e-5, -2e-5, -1, -np.inf, -3e38]):
        rows = [Row(logits, SamplingOptions(temperature=t)) for t in (1e-6, 1e-5, 0.01, 1, 100)]
        assert np.allclose(
            distributions(rows), [reference(row) for row in rows], rtol=2e-2, atol=1e-6
        )


def test_a_processor_must_return_logits():
    for wrong, text in (
        (
            lambda logits, newest, positions: logits[0],
            r"processor returned array \(6,\); it must return logits \(1, 6\)",
        ),
        (
            lambda logits, newest, positions: None,
            r"processor returned NoneType; it must return logits \(1, 6\)",
        ),
    ):
        with pytest.raises(OptionError, match=text):
            drawn([Row(LOGITS, SamplingOptions(processor=wrong))])


def test_a_processor_sees_the_tokens_before_and_the_positions_drawn():
    seen = []

    def spy(logits: mx.array, newest: mx.array, positions: mx.array) -> mx.array:
        seen.append((logits.dtype, newest.tolist(), positions.tolist()))
        return logits

    options = SamplingOptions(processor=spy)
    assert Filters.of([options, options]) == Filters(processors=(spy,))
    assert drawn(
        [Row(LOGITS, options, [1, 2], position=9), Row(LOGITS, options, [1], [3, 4], position=8)]
    ) == [0, 0]
    assert seen == [(mx.float32, [2, 4], [9, 8])]


def test_log_probabilities_are_those_of_the_model():
    found = logprobs(mx.array([LOGITS]), mx.array([3]), 2)
    p = softmax(np.array(LOGITS))
    assert found.chosen.item() == pytest.approx(
        math.log(p[3]), abs=1e-5
    ) and found.top_tokens.tolist() == [[0, 1]]
    assert found.top.tolist()[0] == pytest.approx(np.log(p[:2]).tolist(), abs=1e-5)


def test_values_for_several_tokens_of_a_row_lie_side_by_side():
    options = [
        SamplingOptions(temperature=1.0, logit_bias={1: 2.0}),
        None,
        SamplingOptions(temperature=2.0),
    ]
    controls = Controls.of(options, Filters.of([o for o in options if o]), 3).repeated(2)
    assert (
        controls.temperature.tolist() == pytest.approx([1, 1, 0, 0, 2, 2])
        and controls.top_k is None
    )
    filters = Filters.of([SamplingOptions(temperature=1.0, top_k=50), SamplingOptions(top_k=70)])
    assert filters.shortlist == 64 and Controls.of(
        [SamplingOptions(top_k=70), None], filters, 100
    ).top_k.tolist() == [1, 1]
    assert controls.bias.tolist() == [[0, 2, 0]] * 2 + [[0, 0, 0]] * 4


SIDE = 101  # 100 x 100 pairs of neighbours, and the tokens between which they are
EVEN = 64  # tokens, all of them equally likely


def agreement_bound(pairs: int) -> float:
    """How many of so many pairs of independent, even draws may agree: one set in a billion has
    more.
    """
    mean = pairs / EVEN
    return mean + 6 * math.sqrt(mean * (1 - 1 / EVEN))


def agreements(one: np.ndarray, other: np.ndarray) -> list[int]:
    """Equal tokens of two rows [sequences, positions], the other one shifted by up to three
    positions.
    """
    cut = [
        (slice(max(0, lag), SIDE - 1 + min(0, lag)), slice(max(0, -lag), SIDE - 1 + min(0, -lag)))
        for lag in range(-3, 4)
    ]
    return [int((one[:, mine] == other[:, theirs]).sum()) for mine, theirs in cut]


def test_neighbouring_seeds_streams_and_positions_are_as_good_as_unrelated_ones():
    groups = {
        "seeds": [(seed, 0) for seed in range(SIDE)],
        "streams": [(0, stream) for stream in range(SIDE)],
        "unrelated": [
            (seed * 7919**3 % 2**61, seed * 104729 % 2**31) for seed in range(1, SIDE + 1)
        ],
        "both": [(seed, SIDE - seed) for seed in range(SIDE)],
    }
    keys = mx.concatenate(
        [seed_key(seed, stream) for pairs in groups.values() for seed, stream in pairs]
    )
    places = [mx.full((len(keys),), place) for place in range(1, SIDE)]
    tokens = np.stack(
        [np.array(mx.argmax(gumbel(keys, place, EVEN), axis=-1)) for place in places], axis=1
    )
    by_group = dict(zip(groups, tokens.reshape(len(groups), SIDE, SIDE - 1), strict=True))
    assert (by_group["seeds"][0] == by_group["streams"][0]).all()  # the very same seed and stream
    for name, one in by_group.items():
        assert max(agreements(one[1:], one[:-1])) < agreement_bound((SIDE - 1) ** 2), name
        assert (one[:, 1:] == one[:, :-1]).sum() < agreement_bound(SIDE * (SIDE - 2)), (
            name
        )  # positions beside each other
    across = agreements(by_group["seeds"][1:], by_group["streams"][1:])
    assert max(across) < agreement_bound((SIDE - 1) ** 2)
    counts = np.bincount(tokens.ravel(), minlength=EVEN)
    expected = (
        tokens.size - 2 * (SIDE - 1)
    ) / EVEN  # two sequences come three times, which widens the sum a little
    assert ((counts - expected) ** 2 / expected).sum() < EVEN + 6 * math.sqrt(2 * EVEN)
