"""How long drafts are, and what prompt lookup finds; no model runs here."""

from __future__ import annotations

import numpy as np
import pytest

from openelm_mlx.engine.speculation import (
    EXTRA,
    LEAVING,
    LENGTHS,
    DraftLength,
    PromptLookup,
    gain,
    longest_gain,
)


def test_lookup_finds_the_latest_occurrence_and_repeats_a_loop():
    lookup = PromptLookup(2, limit=8)
    known = [5, 6, 7, 8, 5, 6, 9, 5, 6]
    assert lookup.find(known) == (6, 2) and lookup.propose(known, 5) == [9, 5, 6, 9, 5]
    unseen = [*known, 1]
    assert (
        lookup.find(unseen) is None
        and lookup.propose(unseen, 5) == []
        and lookup.length(unseen) == 0
    )
    assert PromptLookup(3, limit=8).find([1, 2, 3]) is None
    assert PromptLookup(3, limit=8).find([4, 5, 9, 5]) == (
        2,
        1,
    )  # no longer match: the latest one of length 1
    assert PromptLookup(3, limit=5, adaptive=False).length([4, 5, 9, 5]) == 5


def test_lookup_drafts_where_its_guesses_came_true():
    looping, wild = PromptLookup(2, limit=8), PromptLookup(2, limit=8)
    assert looping.length([1, 2, 3] * 9) == 8 and looping.hits[2] > 0.9
    noise = [int(x) for x in np.random.default_rng(0).integers(0, 9, 80)]
    assert wild.length(noise) == 0 and max(wild.hits[1:]) < 0.5


def test_the_share_of_accepted_drafts_is_a_mean_that_forgets():
    length = DraftLength(limit=8, cost=0.1)
    length.record(9, 4, 2)  # two hits, a rejection, and one token that tells nothing
    assert length.acceptance == pytest.approx(((0.7 * 0.9 + 0.1) * 0.9 + 0.1) * 0.9)


def test_drafting_stops_while_it_loses_and_tries_again():
    length, asked = DraftLength(limit=8, cost=0.3), []
    for known in range(600):
        k = length.length(known)
        asked.append(k)
        if k:
            length.record(known, k, 0)
    assert asked[0] and sum(k > 0 for k in asked) < 0.05 * len(asked) and any(asked[300:])
    for known in range(600, 1200):
        k = length.length(known)
        if k:
            length.record(known, k, k)
    assert k == 8 and DraftLength(5, 0.3, adaptive=False).length(0) == 5


def test_the_gain_is_tokens_by_passes():
    a, k = 0.7, 3
    assert gain(a, k, 0.1) == pytest.approx(
        sum(a**i for i in range(k + 1)) / (1 + LEAVING + k * (0.1 + EXTRA))
    )
    for cost in (0.0, 0.2, 0.9):
        best, most = longest_gain(a, 6, cost)
        assert best <= 6 and most == gain(a, best, cost) == max(
            gain(a, k, cost) for k in LENGTHS if k <= 6
        )
