"""Tasks of ten thousand questions: what is around the model takes work in proportion to them."""

from __future__ import annotations

import random
import sys
from collections import Counter

import pytest
from local_tasks import task_folder

from openelm_mlx.evaluate import plan as planning
from openelm_mlx.evaluate.plan import Request, plan


@pytest.mark.needs("lm-eval")
def test_a_template_of_a_task_is_compiled_once(tiny, tmp_path, monkeypatch):
    from lm_eval.utils import env

    from openelm_mlx.evaluate.harness import OpenELMLM, evaluate_tasks

    compiled, compile_one = Counter(), env.compile

    def counted(source: str) -> object:
        compiled[source] += 1
        return compile_one(source)

    monkeypatch.setattr(env, "compile", counted)
    for folder in task_folder(tmp_path):
        evaluate_tasks(OpenELMLM(tiny), {"solved": None}, include=[folder], limit=3)
    assert "{{question}}" in compiled and set(compiled.values()) == {1}
    assert "from_string" not in vars(env)


def work_of(asked: list[Request]) -> int:
    """Count the calls of functions while requests are planned."""
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        plan(asked, 256)
    finally:
        sys.setprofile(None)
    return calls


def questions(count: int, before: int, own: int) -> list[Request]:
    """Questions of two choices, of so many tokens after so many that all have in common."""
    rng = random.Random(6)
    shared, *contexts = (
        tuple(rng.randrange(3, 4000) for _ in range(length)) for length in [before, *[own] * count]
    )
    return [Request(shared + one, (n,)) for one in contexts for n in range(2)]


@pytest.mark.parametrize(
    "before, own",
    [(0, 30), (100, 30), pytest.param(0, 400, id="each has a prefix of its own"), (100, 0)],
)
def test_plans_of_twice_as_many_questions_take_twice_the_work(before, own):
    few, many = (work_of(questions(count, before, own)) for count in (100, 200))
    assert few < many < 2.4 * few


def test_a_pass_looks_at_no_more_rows_than_it_may_take(monkeypatch):
    taken, seen = planning.rows_of_a_pass, []

    def counted(lengths: list[int], prefix: int, batch_tokens: int) -> int:
        seen.append(len(lengths))
        return taken(lengths, prefix, batch_tokens)

    monkeypatch.setattr(planning, "rows_of_a_pass", counted)
    passes = plan([Request((n, n), (5,)) for n in range(200)], 16)
    assert len(passes) == 200 * 2 / 16 and max(seen) == 16
