"""Sampling: every filter against plain arithmetic in float64, rows in a batch against each alone,
draws against chance.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from sampling_rows import (
    LOGITS,
    Row,
    distributions,
    drawn,
    inputs,
    random_rows,
    reference,
    softmax,
)

from openelm_mlx.device import mx
from openelm_mlx.engine import decode
from openelm_mlx.engine.decode import logprobs
from openelm_mlx.engine.options import SamplingOptions
from openelm_mlx.engine.sampling import (
    Controls,
    Filters,
    History,
    filter_logits,
)
from openelm_mlx.errors import OptionError


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


@pytest.mark.parametrize("masked", [False, True])
def test_every_combination_of_filters_gives_the_documented_distribution(masked):
    rows = random_rows(200, seed=1, masked=masked)
    expected, found = np.stack([reference(row) for row in rows]), distributions(rows, masked)
    assert ((found > 1e-30) == (expected > 1e-30)).all()
    assert np.allclose(found, expected, rtol=1e-3, atol=1e-6)
    assert (
        sum(row.options.greedy for row in rows) > 20 and len({(e > 0).sum() for e in expected}) > 20
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


@pytest.mark.parametrize("options", [{}, {"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}], ids=str)
def test_a_processor_forces_a_token_by_an_infinite_logit(options):
    def forced(logits: mx.array, newest: mx.array, positions: mx.array) -> mx.array:
        return mx.where(mx.arange(6) == 4, math.inf, logits)

    assert kept(processor=forced) == kept(temperature=1.0, processor=forced, **options)
    assert kept(processor=forced) == [False] * 4 + [True, False]


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


@pytest.mark.parametrize("n", [1, 5, 20, 300, 305])
def test_the_highest_are_the_first_of_a_stable_sort(n, monkeypatch):
    """On a processor by a partition, on a GPU by a sort: the same, among equal ones and infinite
    ones too, and where rounding lifts a log probability above 0.
    """
    values = -np.abs(np.random.default_rng(1).normal(size=(6, 300))) * [
        [1],
        [30],
        [30],
        [1],
        [1],
        [1],
    ]
    values[2:] = np.round(values[2:] * 2) / 2
    values[3, 100:], values[4, :] = -np.inf, -1.0
    values[5, 7] = 6e-8
    given = mx.array(values.astype(np.float32))
    wanted = np.argsort(-values, axis=-1, kind="stable")[:, :n]
    for device in ("cpu", "metal"):
        monkeypatch.setattr(decode, "kind", lambda device=device: device)
        found = decode.highest(given, n)
        assert found.dtype == mx.uint32 and np.array_equal(found, wanted)


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
