"""Plans of passes: what shares a beginning is fed once, within the tokens that a pass may take."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any
from unittest.mock import patch

from hypothesis import example, given, settings
from hypothesis import strategies as st

from openelm_mlx.evaluate import plan as planning
from openelm_mlx.evaluate.plan import Pass, Request, Tree, common, plan

MANY = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def texts(least: int) -> Any:
    """Few different tokens, so that many texts begin alike."""
    return st.lists(st.integers(1, 3), min_size=least, max_size=12).map(tuple)


def requests() -> Any:
    return st.lists(st.builds(Request, texts(1), texts(1)), max_size=20)


def beginning(work: Pass, asked: list[Request]) -> tuple[int, ...]:
    """The prefix of a pass."""
    return asked[work.requests[0]].fed[: work.prefix]


def words(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(3, 4000) for _ in range(count))


def rows(work: Pass, asked: list[Request]) -> list[list[tuple[int, ...]]]:
    """The tokens of each request of each row, after the prefix."""
    left = [asked[number].fed[work.prefix :] for number in work.requests]
    return [[left.pop(0) for _ in range(size)] for size in work.rows]


BETWEEN = [  # rows of the last two have the passes of a prefix between them
    Request((3, 2, 1, 1, 1, 2, 1, 2), (3, 1, 3, 3, 3)),
    Request((3, 2, 1, 3, 1), (3, 3, 1, 2)),
    Request((3, 2, 1, 1), (3, 3, 2, 1, 3, 3, 1)),
    Request((3, 2, 2, 1), (2,)),
    Request((2,), (3, 1)),
]


LONG = [  # the last two have a prefix, each because it is long, and it is the same one
    Request((2, 2), (1, 2)),
    Request((2, 2, 1, 2), (1, 1)),
    Request((2, 2, 1, 1), (2, 1)),
    Request((2, 1, 2, 1, 2, 1, 1, 2, 1, 1, 2), (2, 1, 2, 1)),
]


@patch.multiple(planning, SHORTEST=3, WORTH=2)
@MANY
@given(requests(), st.integers(1, 60), st.sampled_from((512, 8)))
@example(BETWEEN, 11, 512)
@example(LONG, 3, 8)
def test_each_request_is_answered_once_in_passes_that_fit(asked, batch_tokens, width):
    with patch.object(planning, "WIDTH", width):
        passes = plan(asked, batch_tokens)
        assert plan(asked, batch_tokens) == passes
    assert sorted(n for work in passes for n in work.requests) == list(range(len(asked)))
    for before, work in pairwise([None, *passes]):
        first = before is None or beginning(before, asked) != beginning(work, asked)
        tokens = work.tokens - work.prefix * first
        trees = [Tree.of(row) for row in rows(work, asked)]
        assert tokens == len(trees) * max(len(tree.tokens) for tree in trees)
        assert tokens - sum(len(tree.tokens) for tree in trees) <= planning.WORTH
        assert tokens <= batch_tokens or (len(trees) == 1 and not trees[0].branches)
        assert {asked[n].fed[: work.prefix] for n in work.requests} == {beginning(work, asked)}
        assert all(work.prefix < len(asked[n].context) for n in work.requests)


@MANY
@given(st.lists(texts(1), min_size=1, max_size=12).map(sorted))
def test_a_token_of_a_tree_is_seen_by_its_own_branch(sequences):
    tree = Tree.of(sequences)
    prefixes = {text[:length] for text in sequences for length in range(1, len(text) + 1)}
    assert len(tree.tokens) == len(prefixes)
    for sequence, path in zip(sequences, tree.paths, strict=True):
        assert tuple(tree.tokens[place] for place in path) == sequence
        assert [tree.depths[place] for place in path] == list(range(len(path)))
        last = path[-1]
        assert [at for at in range(last + 1) if last < tree.ends[at]] == path
    assert tree.branches == any(common(text, sequences[-1]) < len(text) for text in sequences)


def test_choices_are_branches_after_their_context():
    tree = Tree.of([(7, 8, 9, 4), (7, 8, 9, 5)])
    assert tree == Tree(
        [7, 8, 9, 4, 5], [0, 1, 2, 3, 3], [5, 5, 5, 4, 5], [[0, 1, 2, 3], [0, 1, 2, 4]]
    )
    assert tree.branches and not Tree.of([(7, 8), (7, 8, 9)]).branches


def test_a_question_is_one_row_and_answers_of_one_token_add_none():
    rng = random.Random(3)
    asked = []
    for _ in range(50):
        context = words(rng, rng.randint(20, 40))
        asked += [Request(context, (letter,)) for letter in range(4)]
    passes = plan(asked, 4096)
    fed = sum(len(request.context) for request in asked[::4])
    assert [size for work in passes for size in work.rows] == [4] * 50
    assert 0 <= sum(work.tokens for work in passes) - fed <= planning.WORTH * len(passes)


def test_examples_before_every_question_are_run_once():
    rng = random.Random(4)
    asked, subjects = [], [words(rng, 20) + words(rng, 600 + 10 * n) for n in range(3)]
    for subject in subjects:
        for _ in range(40):
            context = subject + words(rng, rng.randint(20, 60))
            asked += [Request(context, (letter,)) for letter in range(4)]
    passes = plan(asked, 2048)
    assert sorted({work.prefix for work in passes}) == [620, 630, 640]
    fed = sum(len(request.context) for request in asked[::4])
    assert sum(work.tokens for work in passes) < fed / 8
    changes = sum(beginning(a, asked) != beginning(b, asked) for a, b in pairwise(passes))
    assert changes == len(subjects) - 1  # passes with the same prefix follow each other


def test_memory_of_attention_limits_a_pass():
    rng = random.Random(5)
    context = words(rng, 2000)
    asked = [Request(context, words(rng, 8)) for _ in range(4)]
    (work,) = plan(asked, 1024)  # one row would take 2,029 * 2,029 pairs
    assert (work.prefix, work.rows, work.tokens) == (1999, (4,), 1999 + 29)
    assert plan([Request(context, (5,))], 1024) == [Pass((0,), 2000, (1,), 1999)]
    rows = [Request(words(rng, 1000), (5,)) for _ in range(5)]
    assert [len(work.rows) for work in plan(rows, 4096)] == [2, 2, 1]
    assert [len(work.rows) for work in plan(rows, 8192)] == [4, 1]


def test_rows_that_stay_too_long_get_no_second_pass_with_the_same_prefix():
    rng = random.Random(6)
    context = words(rng, 200)
    asked = [Request(context, words(rng, length)) for length in (9, 90)]
    passes = plan(asked, 10)
    assert [work.prefix for work in passes] == [199, 199]
    assert sum(work.tokens for work in passes) == 199 + 9 + 90


def test_beginnings_of_a_long_text_are_fed_with_it():
    """A window of a perplexity is asked for in blocks, each after all those before."""
    text = words(random.Random(7), 2048)
    starts = [1, *range(128, 2048, 128)]
    ends = [*starts[1:], 2048]
    asked = [Request(text[:a], text[a:b]) for a, b in zip(starts, ends, strict=True)]
    assert plan(asked, 8192) == [Pass(tuple(range(16)), 2047, (16,))]
    for batch_tokens, most in ((4096, 1.51), (2048, 2.3), (1024, 4.1)):
        passes = plan(asked, batch_tokens)
        assert sum(work.tokens for work in passes) <= most * 2047
        for work in passes:
            longest = len(asked[work.requests[-1]].fed)
            assert (longest - work.prefix) * longest <= batch_tokens * planning.WIDTH
