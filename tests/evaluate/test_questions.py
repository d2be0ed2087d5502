"""The questions that come with the package: their form, and that they load and are scored."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from pathlib import Path
from statistics import fmean

import pytest

from openelm_mlx.evaluate.plan import Request
from openelm_mlx.evaluate.run import answers

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "openelm_mlx" / "assets" / "fairy-tale-questions"
KINDS = {"two": 2, "four": 4}
SHOTS = 5
LIMIT = 10


def read(name):
    return [json.loads(line) for line in (FOLDER / f"{name}.jsonl").open(encoding="ascii")]


QUESTIONS = {kind: read(f"questions_{kind}") for kind in KINDS}
EXAMPLES = {kind: read(f"dev_{kind}") for kind in KINDS}
ALL = [doc for split in (QUESTIONS, EXAMPLES) for docs in split.values() for doc in docs]


def prompt(kind, doc):
    if kind == "two":
        return f"{doc['passage']} {doc['question']}"
    return f"{doc['passage']}\nQuestion: {doc['question']}\nAnswer:"


def likelihoods(engine, kind, docs):
    """Return the log-likelihoods of each question's choices."""
    encode, asked = engine.tokenizer.encode, []
    for doc in docs:
        before = encode(prompt(kind, doc))
        for choice in doc["choices"]:
            whole = encode(f"{prompt(kind, doc)} {choice}")
            assert whole[: len(before)] == before
            asked.append(Request(tuple(before), tuple(whole[len(before) :])))
    found = iter(answers(engine, asked))
    return [[next(found).logprob for _ in doc["choices"]] for doc in docs]


def count(docs, found):
    """Return how many questions are answered rightly, by each metric."""
    right = Counter({"acc": 0, "acc_norm": 0})
    for doc, likely in zip(docs, found, strict=True):
        by_letter = [logp / len(c) for logp, c in zip(likely, doc["choices"], strict=True)]
        right["acc"] += likely[doc["answer"]] == max(likely)
        right["acc_norm"] += by_letter[doc["answer"]] == max(by_letter)
    return right


@pytest.mark.parametrize("kind", KINDS)
def test_there_are_fifty_questions_with_answers_evenly_placed(kind):
    docs, choices = QUESTIONS[kind], KINDS[kind]
    assert len(docs) == 50 and len(EXAMPLES[kind]) > SHOTS
    places = Counter(doc["answer"] for doc in docs)
    assert set(places) == set(range(choices)) and max(places.values()) - min(places.values()) <= 1
    assert [doc["id"] for doc in docs] == [f"{kind}-{n:02d}" for n in range(1, 51)]


@pytest.mark.parametrize("doc", ALL, ids=lambda doc: doc["id"])
def test_a_question_is_whole(doc):
    assert list(doc) == ["id", "passage", "question", "choices", "answer"]
    count = KINDS[doc["id"].partition("-")[0]]
    assert len(set(map(str.lower, doc["choices"]))) == count and doc["answer"] in range(count)
    texts = [doc["passage"], doc["question"], *doc["choices"]]
    assert all(text and text == " ".join(text.split()) for text in texts)
    assert 40 <= len(doc["passage"].split()) <= 90
    assert 2 <= len(re.findall(r"[.](?: |$)", doc["passage"])) <= 5
    ends = {(choice[-1] == ".", choice[0].isupper() or count == 2) for choice in doc["choices"]}
    assert ends == {(count == 2, True)} and doc["question"].endswith("?") == (count == 4)


def test_nothing_is_there_twice():
    for field in ("id", "passage", "question"):
        assert len({doc[field] for doc in ALL}) == len(ALL), field
    openings = Counter(" ".join(doc["passage"].split()[:6]) for doc in ALL)
    assert max(openings.values()) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_length_of_a_choice_does_not_give_it_away(kind):
    """Whoever always takes the longest choice, or the shortest, is right no more than by chance."""
    chance = 50 / KINDS[kind]
    for best in (max, min):
        right = 0.0
        for doc in QUESTIONS[kind]:
            lengths = [len(choice) for choice in doc["choices"]]
            taken = [n for n, length in enumerate(lengths) if length == best(lengths)]
            right += (doc["answer"] in taken) / len(taken)
        assert chance * 0.8 <= right <= chance * 1.1, best


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_of_five_shots_fits_the_bundled_model(kind, tiny):
    shots = [f"{prompt(kind, doc)} {doc['choices'][doc['answer']]}" for doc in EXAMPLES[kind]]
    solved = sum(len(tiny.tokenizer.encode(shot + "\n\n")) for shot in shots[:SHOTS])
    asked = (
        len(tiny.tokenizer.encode(f"{prompt(kind, doc)} {choice}"))
        for doc in QUESTIONS[kind]
        for choice in doc["choices"]
    )
    assert solved + max(asked) <= tiny.config.max_context_length


@pytest.mark.needs("lm-eval")
def test_the_tasks_score_what_a_count_by_hand_does(tiny, tmp_path, monkeypatch):
    import datasets

    from openelm_mlx.evaluate.harness import OpenELMLM, evaluate_tasks

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)  # the files are found from any folder
    found = evaluate_tasks(OpenELMLM(tiny), {"fairy_tales": None}, limit=LIMIT)
    totals: Counter[str] = Counter()
    for kind, docs in QUESTIONS.items():
        task = f"fairy_tales_{kind}"
        assert found["n-samples"][task] == {"original": 50, "effective": LIMIT}
        assert [one["doc"] for one in found["samples"][task]] == docs[:LIMIT]
        own = likelihoods(tiny, kind, docs[:LIMIT])
        for one, logps in zip(found["samples"][task], own, strict=True):
            assert [logp for logp, _ in one["filtered_resps"]] == pytest.approx(logps, abs=1e-4)
        right = count(docs[:LIMIT], own)
        for name, number in right.items():
            assert math.isclose(found["results"][task][f"{name},none"], number / LIMIT)
        totals.update(right)
    for name, number in totals.items():
        assert math.isclose(found["groups"]["fairy_tales"][f"{name},none"], number / LIMIT / 2)


def test_what_guessing_would_score_is_told():
    from openelm_mlx.evaluate.tables import CHANCES

    shares = {kind: [100 / len(doc["choices"]) for doc in docs] for kind, docs in QUESTIONS.items()}
    every = [share for some in shares.values() for share in some]
    known = {f"fairy_tales_{kind}": fmean(some) for kind, some in shares.items()}
    assert {task: float(told) for task, told in CHANCES.items()} == {
        **known,
        "fairy_tales": fmean(every),
    }


def test_the_page_shows_the_example():
    page = (ROOT / "docs" / "evaluating.md").read_text(encoding="utf-8")
    task, questions = (
        ROOT / "examples" / "questions" / f"proverbs.{end}" for end in ("yaml", "jsonl")
    )
    lines = questions.read_text(encoding="ascii").splitlines()
    assert f"```yaml\n{task.read_text(encoding='ascii')}```" in page
    assert f"```json\n{lines[0]}\n```" in page
    rows = [json.loads(line) for line in lines]
    assert all(0 <= row["answer"] < len(set(row["endings"])) for row in rows)
