"""lm-eval's tasks asked of a model: its answers, what its metrics become, and the files."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from functools import partial

import pytest
from full_disk import files_of_at_most
from hypothesis import example, given, settings
from hypothesis import strategies as st
from local_tasks import CHOICE, QUESTIONS, TASKS, write

from openelm_mlx import batch_generate
from openelm_mlx.chat import encode_messages
from openelm_mlx.device import mx
from openelm_mlx.engine.hub import BUNDLED
from openelm_mlx.engine.tokenizer import Tokenizer
from openelm_mlx.errors import EvaluationError
from openelm_mlx.evaluate.report import Subject, report
from openelm_mlx.evaluate.score import log_probs, score

pytestmark = pytest.mark.needs("lm-eval")


@pytest.fixture(scope="module")
def lm_json(tiny):
    """The same model with the other form of its tokenizer."""
    from openelm_mlx.evaluate.harness import OpenELMLM

    tokenizer = Tokenizer.from_file(BUNDLED / "tokenizer.json")
    return OpenELMLM(replace(tiny, tokenizer=tokenizer))


@pytest.fixture(scope="module")
def results(lm, folder):
    from openelm_mlx.evaluate.harness import evaluate_tasks

    tasks = {"both": None, "likely": None, "whole": None, "written": None}
    return evaluate_tasks(lm, tasks, include=[folder])


def expected(engine, context, continuation):
    """Return a log-likelihood by `score`, with one start token whatever the context is."""
    whole = engine.tokenizer.encode(context + continuation)
    before = len(engine.tokenizer.encode(context))
    return sum(score(engine, [whole])[0][before - 1 :])


def answered(results, task):
    return [[float(one[0][0]) for one in row["resps"]] for row in results["samples"][task]]


def test_a_choice_has_the_log_likelihood_of_its_tokens_after_the_question(tiny, results):
    found = answered(results, "choice")
    for row, (question, choices, _) in zip(found, QUESTIONS, strict=True):
        assert row == pytest.approx(
            [expected(tiny, question, f" {choice}") for choice in choices], abs=1e-4
        )


def test_accuracies_are_those_of_a_count_by_hand(results):
    best, best_by_length = [], []
    for row, (_, choices, answer) in zip(answered(results, "choice"), QUESTIONS, strict=True):
        best.append(row.index(max(row)) == answer)
        normed = [one / len(choice) for one, choice in zip(row, choices, strict=True)]
        best_by_length.append(normed.index(max(normed)) == answer)
    own = results["results"]["choice"]
    assert own["acc,none"] == sum(best) / 5 and own["acc_norm,none"] == sum(best_by_length) / 5
    assert own["acc,none"] != own["acc_norm,none"]
    both = results["results"]["both"]["acc,none"]
    assert both == (own["acc,none"] + results["results"]["solved"]["acc,none"]) / 2
    assert results["n-shot"]["choice"] == 0 and results["n-shot"]["solved"] == 1


def test_answers_equal_mlx_lms(results):
    from lm_eval.api.instance import Instance
    from mlx_lm.evaluate import MLXLM

    theirs = MLXLM(str(BUNDLED), use_chat_template=False)
    theirs._model.set_dtype(mx.float32)
    asked, found = [], []
    for task in ("choice", "solved", "likely"):
        for row in results["samples"][task][:4]:  # it splits an empty context otherwise
            pairs = zip(row["arguments"], row["resps"], strict=True)
            for pair, ((logprob, greedy),) in pairs:
                asked.append(Instance("loglikelihood", {}, pair, 0))
                found.append((logprob, greedy))
    theirs_found = theirs.loglikelihood(asked)
    assert [one for one, _ in found] == pytest.approx([one for one, _ in theirs_found], abs=1e-4)
    assert [one for _, one in found] == [bool(one) for _, one in theirs_found]


def test_one_continuation_of_several_contexts(lm, folder):
    from openelm_mlx.evaluate.harness import evaluate_tasks

    contexts = ["The king was", "The sea was"]
    row = {"sentence": contexts, "end": "very old.", "answer": 0}
    (folder / "gap.jsonl").write_text(json.dumps(row))
    how = {"doc_to_text": "answer", "doc_to_choice": "sentence", "doc_to_target": "end"}
    write(folder, "gap", CHOICE | how, "gap.jsonl")
    results = evaluate_tasks(lm, {"gap": None}, include=[folder], chat_template=True)
    found = []
    for text in contexts:
        text = lm.apply_chat_template([{"role": "user", "content": text}])
        before, after = lm._encode_pair(text, "very old.")
        found.append(sum(score(lm.engine, [[*before, *after]])[0][-len(after) :]))
    assert answered(results, "gap") == [pytest.approx(found, abs=1e-4)]


def test_whole_texts_and_generated_ones(tiny, results):
    for row, (_, choices, _) in zip(results["samples"]["whole"], QUESTIONS, strict=True):
        assert row["resps"][0][0] == pytest.approx(expected(tiny, "", f" {choices[0]}"), abs=1e-4)
    prompts = [tiny.tokenizer.encode(question) for question, _, _ in QUESTIONS]
    texts = batch_generate(tiny, prompts, max_tokens=6, stop=[" a", "."])
    assert [row["resps"][0][0] for row in results["samples"]["written"]] == [
        one.text.removeprefix(" ") for one in texts
    ]


def test_the_files_are_read_by_lm_eval(results, tmp_path):
    from lm_eval.utils import get_results_filenames, get_sample_results_filenames, make_table

    from openelm_mlx.evaluate.harness import save

    path = save(results, tmp_path / "new")
    assert [*tmp_path.glob("new/.*")] == [] and path.parent.name == "openelm-tiny"
    names = [str(one) for one in path.parent.iterdir()]
    assert get_results_filenames(names) == [str(path)]
    assert len(get_sample_results_filenames(names)) == 5
    document = json.loads(path.read_text())
    assert "choice" in make_table(document) and "both" in make_table(document, "groups")
    assert document["config"]["model_args"] == {"model": "openelm-tiny"}
    assert document["config"]["bits"] == 8 and document["model_name"] == "openelm-tiny"
    (samples,) = path.parent.glob("samples_choice_*.jsonl")
    assert len(samples.read_text().splitlines()) == 5
    assert results["samples"]["choice"][0]["resps"][0][0] != "", "the document stays as it was"


def test_a_choice_of_shots_is_the_tasks_unless_it_is_given(lm, folder):
    from openelm_mlx.evaluate.harness import evaluate_tasks

    write(folder, "fixed", CHOICE | {"num_fewshot": 0})
    results = evaluate_tasks(lm, {"solved": 2, "fixed": 2}, include=[folder], limit=1)
    assert results["n-shot"] == {"solved": 2, "fixed": 0}
    assert results["n-samples"]["solved"]["effective"] == 1
    (row,) = results["samples"]["solved"]
    assert row["arguments"][0][0].count("\n\n") == 2


WORDS = (
    "a",
    "king",
    "Once upon",
    "é",
    "e\u0301",
    "😀",
    "▁",
    ".",
    "?",
    " ",
    "  ",
    "\n",
    "\u00a0",
    "\0",
)


@settings(max_examples=60, deadline=None)
@given(text=st.lists(st.sampled_from(WORDS)).map("".join), size=st.integers(1, 9))
@example(text="a king. a king, a king a king", size=1)
def test_a_text_in_chunks_has_the_tokens_of_the_whole(lm, lm_json, text, size):
    from openelm_mlx.evaluate import language_model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(language_model, "CHUNK", size)
        assert "".join(language_model.chunks(text)) == text
        for one in (lm, lm_json):
            assert one.chunked and one.tok_encode(text) == one.engine.tokenizer.encode(text)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_chat_is_encoded_as_the_instruct_format(lm, system):
    tokenizer = lm.engine.tokenizer
    messages = [{"role": "system", "content": system}] if system else []
    for role, content in (("user", "Who? "), ("assistant", "A king </s>"), ("user", "<s>Where?")):
        messages.append({"role": role, "content": content})
    text = lm.apply_chat_template(messages)
    assert lm.tok_encode(text) == encode_messages(tokenizer, messages)
    answer = {"role": "assistant", "content": "There it is."}
    whole = encode_messages(tokenizer, [*messages, answer], add_generation_prompt=False)[:-1]
    for begun, rest in (("", "There it is."), ("There", " it is.")):
        opened = [*messages, answer | {"content": begun}]
        context = lm.apply_chat_template(opened, False) if begun else text
        before, after = lm._encode_pair(context, rest)
        assert [*before, *after] == whole
        assert before == encode_messages(tokenizer, opened, False)[:-1]


def test_tasks_in_a_chat(lm, folder):
    from openelm_mlx.evaluate.harness import evaluate_tasks

    how = {"include": [folder], "limit": 2, "chat_template": True, "system": "Be brief."}
    results = evaluate_tasks(lm, {"solved": None}, **how)
    (question, choices, _), (other, others, right) = QUESTIONS[1], QUESTIONS[0]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": other},
        {"role": "assistant", "content": others[right]},
        {"role": "user", "content": question},
    ]
    before = encode_messages(lm.engine.tokenizer, messages)
    found = []
    for choice in choices:
        more = [*messages, {"role": "assistant", "content": choice}]
        whole = encode_messages(lm.engine.tokenizer, more, add_generation_prompt=False)[:-1]
        found.append(sum(score(lm.engine, [whole])[0][len(before) - 1 :]))
    assert answered(results, "solved")[1] == pytest.approx(found, abs=1e-4)
    assert results["chat_template"].count("{{ message }}") == 1 and results["system_instruction"]


def test_what_is_beyond_the_context_is_left_out_and_counted(short, folder):
    from openelm_mlx.evaluate.harness import OpenELMLM, evaluate_tasks

    lm = OpenELMLM(short)
    choices = ["was very old", "went to the forest"]
    row = {"question": "king" + " king" * 61, "choices": choices, "answer": 0}
    rows = [row, row | {"question": "The king"}]
    (folder / "long.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write(folder, "long", CHOICE, "long.jsonl")
    write(folder, "long_text", TASKS["whole"] | {"doc_to_target": "{{question * 3}}"}, "long.jsonl")
    write(folder, "long_answer", TASKS["written"], "long.jsonl")
    tasks = dict.fromkeys(("long", "long_text", "long_answer"))
    results = evaluate_tasks(lm, tasks, include=[folder])
    assert results["truncated"] == {"long": 1, "long_answer": 1, "long_text": 0}
    encode = lm.engine.tokenizer.encode
    for found, choice in zip(answered(results, "long")[0], choices, strict=True):
        after = len(encode(f"king {choice}")) - len(encode("king"))
        whole = mx.array(encode(row["question"] + f" {choice}")[-65:])
        logp = log_probs(lm.engine.model(whole[None, :-1])[0])  # 64 tokens are fed
        chosen = mx.take_along_axis(logp, whole[1:, None], axis=-1)[-after:]
        assert found == pytest.approx(chosen.sum().item(), abs=1e-4)
    kept = encode(row["question"])[-58:]  # its answer has up to 6 tokens
    (answer,) = batch_generate(lm.engine, [kept], max_tokens=6, stop=[" a", "."])
    assert results["samples"]["long_answer"][0]["resps"] == [[answer.text.removeprefix(" ")]]


@pytest.mark.parametrize("answers", [(0, 1, 2, -1), ("was old", "went home", "was young", "left")])
def test_an_answer_that_is_no_choice_is_counted_and_told(lm, folder, answers):
    from openelm_mlx.evaluate.harness import evaluate_tasks

    row = {"question": "The king", "choices": ["was old", "went home"]}
    rows = [row | {"answer": answer} for answer in answers]
    (folder / "keys.jsonl").write_text("\n".join(map(json.dumps, rows)))
    write(folder, "keys", CHOICE | {"doc_to_target": "answer"}, "keys.jsonl")
    results = evaluate_tasks(lm, {"keys": None}, include=[folder])
    assert results["without_answer"] == {"keys": 2}
    (note,) = [note for note in report(results, Subject("tiny")).notes if "choices" in note]
    assert (
        note == "keys: the answer to 2 of 4 questions is none of their choices, so none is right."
    )


def test_what_lm_eval_caches_is_there_as_soon_as_a_pass_ends(tiny, results, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CachingLM

    from openelm_mlx.evaluate.harness import OpenELMLM

    def stopping(done, *_):
        if done:
            raise KeyboardInterrupt

    arguments = [pair for row in results["samples"]["choice"] for pair in row["arguments"]]
    asked = [Instance("loglikelihood", {}, pair, 0) for pair in arguments]
    lm = OpenELMLM(tiny, batch_tokens=32, progress=stopping)
    with pytest.raises(KeyboardInterrupt):
        CachingLM(lm, str(tmp_path / "cache.db")).loglikelihood(asked)
    lm.progress = None
    cached = CachingLM(lm, str(tmp_path / "cache.db"))
    assert 0 < len(cached.dbdict) < len(asked)
    found = [logprob for logprob, _ in cached.loglikelihood(asked)]
    flat = [one for row in answered(results, "choice") for one in row]
    assert found == pytest.approx(flat, abs=1e-4)


def test_files_that_cannot_be_written(results, tmp_path):
    from openelm_mlx.evaluate.harness import save

    said = f"results cannot be written to {tmp_path}: OSError.*large"
    with pytest.raises(EvaluationError, match=said), files_of_at_most(4096):
        save(results, tmp_path)
    assert [*tmp_path.iterdir()] == []
    (tmp_path / "file").write_text("")
    with pytest.raises(EvaluationError, match=f"cannot be written to {tmp_path}/file: File exists"):
        save(results, tmp_path / "file")


def test_nothing_is_printed_and_logs_are_as_before(lm, folder, capfd):
    from openelm_mlx.evaluate.harness import evaluate_tasks

    logger = logging.getLogger("lm_eval")
    logger.setLevel(logging.INFO)
    evaluate_tasks(lm, {"both": None}, include=[folder])
    print("said")
    assert capfd.readouterr() == ("said\n", "") and logger.level == logging.INFO


def test_lm_evals_own_command_knows_the_model(folder, tmp_path, monkeypatch, capsys):
    from lm_eval import tasks

    from openelm_mlx.evaluate.__main__ import main
    from openelm_mlx.evaluate.harness import task_error

    few = partial(tasks.TaskManager, include_defaults=False)  # all are read in seconds
    monkeypatch.setattr(tasks, "TaskManager", few)
    monkeypatch.setattr("lm_eval.__main__.setup_logging", lambda: None)  # it would stay
    monkeypatch.chdir(folder)  # where it looks for data files

    def run(arguments, *more):
        asked = ["--tasks", "both", "--include_path", str(folder), "--output_path", str(tmp_path)]
        command = ["lm_eval", "run", "--model", "openelm", "--model_args", arguments]
        monkeypatch.setattr(sys, "argv", [*command, *asked, *more])
        main()

    run("model=openelm-tiny,batch_tokens=512")
    assert "|both" in capsys.readouterr().out
    (path,) = tmp_path.glob("openelm-tiny/results_*.json")
    assert json.loads(path.read_text())["config"]["batch_tokens"] == 512
    with pytest.raises(SystemExit, match="2"):
        run("model=nowhere")
    assert "openelm: unknown model 'nowhere'; a model is" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        run("model=openelm-tiny", "--limit", "0.5", "--samples", '{"choice": [1]}')
    said = "openelm: lm-eval fails: ValueError: If --samples is not None, then --limit must be None"
    assert said in capsys.readouterr().err
    said = "Tasks not found: x; python -m openelm_mlx.evaluate ls tasks lists lm-eval's, and"
    assert said in str(task_error(ValueError("Tasks not found: x")))
