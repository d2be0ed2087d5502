"""A batch gives each line the answer that it has elsewhere, whatever becomes of the process."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from batch_lines import RESPONSE, TEXT, line, read, some, stable, write

from openelm_mlx import BatchEngine, PromptCache, generate
from openelm_mlx.benchmarks.checks import random_engine
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.prompts import prompt_tokens
from openelm_mlx.errors import OptionError
from openelm_mlx.server.batch_file import ID, Input, Output, answers_in, mark_of, part_of, parts_of
from openelm_mlx.server.batch_run import Batch, number_of

HEAD = {"format": "test", "model": "openelm-tiny"}
SAMPLED = {"temperature": 0.8, "max_tokens": 5}


def answered(engine: Engine, source: Input, output: Output, rank: int = 0, ranks: int = 1) -> int:
    """Run the lines of a process that have no answer, and return how many there were."""
    batch = Batch(engine, "openelm-tiny", BatchEngine(engine, 4, max_waiting=8))
    left = [index for index in source.dealt(rank, ranks) if not output.done[index]]
    for results in batch.results(map(source.line, left)):
        output.add([result.text for result in results])
    return len(left)


def answers(engine: Engine, path: Path, lines: list[Any]) -> list[dict[str, Any]]:
    """Return the answers to these lines."""
    source, target = Input(write(path / "in.jsonl", lines)), path / "out.jsonl"
    output = Output(target, source, HEAD, 0)
    answered(engine, source, output)
    joined = output.join()
    found = read(target)
    assert joined == (len(found), sum(one["response"]["status_code"] != 200 for one in found))
    target.unlink()
    return found


@pytest.fixture(scope="module")
def small(tiny: Engine) -> Engine:
    """A model whose step takes next to no time."""
    return random_engine(tiny, 3, vocab=tiny.tokenizer.vocab_size)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    """A folder with requests, in.jsonl, and their answers, whole.jsonl."""
    return tmp_path_factory.mktemp("batch")


@pytest.fixture(scope="module")
def whole(small: Engine, folder: Path) -> list[dict[str, Any]]:
    """The answers of an uninterrupted run to `some(45)`."""
    return [stable(one) for one in answers(small, folder, some(45))]


def test_a_line_is_answered_as_by_the_server_and_by_generate(tiny, http: httpx.Client, tmp_path):
    asked = [{"role": "user", "content": "Tell me a story."}]
    lines = [
        line("chat", messages=asked, n=2, seed=3, **SAMPLED),
        line("texts", TEXT, prompt=["Once", "A dog"], echo=True, seed=4, logprobs=1, **SAMPLED),
        line("unseeded", messages=asked, model="openelm-tiny", **SAMPLED),
        line("nothing", TEXT, prompt="Once", echo=True, max_tokens=0),
        line("response", RESPONSE, input="Hello", max_output_tokens=5, seed=5, metadata={"a": "b"}),
    ]
    found = answers(tiny, tmp_path, lines)
    seeds = [{}, {}, {"seed": number_of("unseeded")}, {}, {}]
    for one, sent, seed in zip(found, lines, seeds, strict=True):
        served = http.post(sent["url"], json=sent["body"] | seed).json()
        assert one["custom_id"] == sent["custom_id"]
        assert (one["error"], one["response"]["status_code"]) == (None, 200)
        same = one | {"response": one["response"] | {"body": served}}
        assert stable(one) == stable(same)
    text = generate(tiny, asked, tiny.chat_sampling, seed=3, **SAMPLED)
    assert found[0]["response"]["body"]["choices"][0]["message"]["content"] == text
    seeded = generate(tiny, asked, tiny.chat_sampling, seed=number_of("unseeded"), **SAMPLED)
    assert found[2]["response"]["body"]["choices"][0]["message"]["content"] == seeded


WRONG: list[tuple[Any, int, str]] = [
    ("{", 400, "the line is not JSON that can be read: "),
    ("[" * 9999, 400, "the line is not JSON that can be read: "),
    ("[1]", 400, "the line is not a JSON object; give one request a line"),
    ('{"url": 1, "url": 1}', 400, "an object has the name 'url' twice"),
    ({"custom_id": 5}, 400, "custom_id: Input should be a valid string"),
    (line("a") | {"method": "GET"}, 400, "method: Input should be 'POST'"),
    (line("b") | {"url": "/v1/embeddings"}, 400, "url: Input should be '/v1/chat/completions'"),
    (line("c") | {"extra": 1}, 400, "extra is not supported here; leave it out"),
    (line("d", tools=[1]), 400, "tools is not supported here; leave it out"),
    (line("e", temperature=-1.0), 400, "temperature: Input should be greater than or equal to 0"),
    (line("f", stream=True), 400, "stream is true, but a batch answers as a whole; leave it out"),
    (line("g", max_tokens=5000), 400, "the context holds 512 together"),
    (line("r", RESPONSE, input="Hello", stream=True), 400, "stream is true, but a batch answers"),
    (line("h", model="gpt-9"), 404, "'gpt-9' is not the one that runs, which is openelm-tiny"),
    (line("i", logit_bias={"99999": 1.0}), 400, "logit_bias has the token id 99999"),
    (line("ok"), 400, "an earlier line has the custom_id 'ok' too; give each line its own"),
    (line("j", messages=[{"role": "assistant", "content": ""}]), 400, "expected 'user'"),
    (line("k", TEXT, prompt=""), 400, "prompt: String should have at least 1 character"),
    (line("l\ud800"), 400, "the line is not JSON that can be read: "),
]


def test_a_line_that_cannot_be_answered_gets_its_error_and_no_other_does(small, tmp_path):
    good = line("ok", max_tokens=1)
    lines = [good, "", *(wrong for wrong, _, _ in WRONG), line("last", n=3, max_tokens=1)]
    found = answers(small, tmp_path, lines)
    statuses = [one["response"]["status_code"] for one in found]
    assert statuses == [200, *(status for _, status, _ in WRONG), 200]
    ids = [one["id"] for one in found[:2]]
    assert ids == ["batch_req_1", "batch_req_3"]  # the numbers of lines in the file
    for one, (sent, _, message) in zip(found[1:], WRONG, strict=False):
        error = one["response"]["body"]["error"]
        assert message in error["message"]
        assert set(error) == {"message", "type", "param", "code"}
        name = sent.get("custom_id") if isinstance(sent, dict) else None
        assert one["custom_id"] == (name if isinstance(name, str) else None)


def test_a_line_longer_than_a_body_may_be_is_an_error(small, tmp_path, monkeypatch):
    for module in ("batch_file", "batch_run"):
        monkeypatch.setattr(f"openelm_mlx.server.{module}.LINE_BYTES", 200)
    found = answers(small, tmp_path, [line("a", user="u" * 900), line("b", max_tokens=1)])
    assert [one["response"]["status_code"] for one in found] == [413, 200]
    assert "more than 200 bytes" in found[0]["response"]["body"]["error"]["message"]


@pytest.mark.parametrize("share", [0.0, 0.05, 0.4, 0.7, 0.99])
def test_a_part_cut_anywhere_is_gone_on_with(small, folder, whole, tmp_path, share):
    """A kill leaves the bytes written so far: no answer is lost, and none is run again."""
    source, target = Input(folder / "in.jsonl"), tmp_path / "out.jsonl"
    first = Output(target, source, HEAD, 0)
    answered(small, source, first)
    first.close()
    data = part_of(target, 0).read_bytes()
    part_of(target, 0).write_bytes(data[: int(len(data) * share)])
    kept = max(data[: int(len(data) * share)].count(b"\n") - 1, 0)  # the first line is the head
    again = Output(target, source, HEAD, 0)
    assert answered(small, source, again) == len(source) - kept
    assert again.join() == (45, 1)
    assert [stable(one) for one in read(target)] == whole
    assert parts_of(target) == []
    assert answers_in(target, source, ID) == (45, 1)


def test_processes_that_share_a_batch_give_what_one_gives(small, folder, whole, tmp_path):
    source, target = Input(folder / "in.jsonl"), tmp_path / "out.jsonl"
    shares = [list(source.dealt(rank, 3)) for rank in range(3)]
    assert sorted(sum(shares, [])) == list(range(45))
    work = [sum(source._lengths[index] for index in share) for share in shares]
    assert max(work) < 1.5 * min(work)
    for rank in range(2):
        answered(small, source, output := Output(target, source, HEAD, rank), rank, 3)
        assert output.join() is None
        output.close()
    last = Output(target, source, HEAD, 5)  # another number of processes goes on
    assert answered(small, source, last) == len(shares[2])
    assert last.join() == (45, 1)
    assert [stable(one) for one in read(target)] == whole


def test_an_answer_that_two_processes_have_given_counts_once(small, tmp_path):
    source = Input(write(tmp_path / "in.jsonl", [line("a", max_tokens=1), line("b", best=1)]))
    outputs = [Output(tmp_path / "out.jsonl", source, HEAD, rank) for rank in (0, 1)]
    for output in outputs:
        answered(small, source, output)
    assert outputs[1].join() == outputs[0].join() == (2, 1)  # both at once, as may happen
    assert [one["custom_id"] for one in read(tmp_path / "out.jsonl")] == ["a", "b"]


def test_rows_are_kept_full_and_memory_bounded(small, tmp_path):
    """Lines are read only as rows become free, and never fewer requests wait than there are."""
    source = Input(write(tmp_path / "in.jsonl", [line(f"{n}", max_tokens=4) for n in range(40)]))
    batch, taken = Batch(small, "m", BatchEngine(small, 4, max_waiting=8)), []

    def lines() -> Iterator[tuple[int, bytes, bool]]:
        for index in range(len(source)):
            taken.append(index)
            yield source.line(index)

    ended = 0
    for results in batch.results(lines()):
        ended += len(results)
        assert len(taken) - ended <= batch.most == 8
        assert len(taken) == 40 or len(taken) - ended >= 4
    assert ended == 40


def test_neighbours_with_one_system_turn_prefill_it_once(small, tmp_path):
    role = {"role": "system", "content": "Tell it as a fox would. " * 12}
    lines = [
        line(str(n), messages=[role, {"role": "user", "content": f"Day {n}?"}], max_tokens=3)
        for n in range(20)
    ]
    source = Input(write(tmp_path / "in.jsonl", lines))
    scheduler = BatchEngine(small, 4, prompt_cache=PromptCache(), max_waiting=8)
    batch = Batch(small, "openelm-tiny", scheduler)
    found = [one for results in batch.results(map(source.line, range(20))) for one in results]
    shared = len(prompt_tokens(small, [role, {"role": "user", "content": ""}])) - 20
    assert shared > 64
    prefilled = sum(one.prompt_tokens - one.cached_tokens for one in found)
    assert prefilled < sum(one.prompt_tokens for one in found) - 18 * shared


@pytest.mark.parametrize("change", ["model", "input"])
def test_a_part_of_another_batch_is_refused(tmp_path, change):
    source, target = Input(write(tmp_path / "in.jsonl", [line("a")])), tmp_path / "out.jsonl"
    Output(target, source, {"input": 1, "model": 1}, 0).close()
    expected = f"part-0 was begun with another {change}; give the same, another -o, or remove it"
    with pytest.raises(OptionError, match=expected):
        Output(target, source, {"input": 1, "model": 1} | {change: 2}, 0)


def test_a_part_has_one_writer(tmp_path):
    source, target = Input(write(tmp_path / "in.jsonl", [line("a")])), tmp_path / "out.jsonl"
    first = Output(target, source, HEAD, 0)
    with pytest.raises(OptionError, match="another process is writing .*part-0; wait for it"):
        Output(target, source, HEAD, 0)
    first.close()


def test_an_input_that_changes_is_noticed(tmp_path):
    source = Input(path := write(tmp_path / "in.jsonl", [line("a"), line("b")]))
    path.write_bytes(path.read_bytes().replace(b'"b"', b'"c"'))
    with pytest.raises(OptionError, match=r"in\.jsonl has changed while it was read; remove"):
        source.line(1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*: No such file or directory; give a file"),
        (b" \n\n", "has no requests; give a file with one a line"),
    ],
)
def test_an_input_without_requests_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "in.jsonl").write_bytes(content)
    with pytest.raises(OptionError, match=message):
        Input(tmp_path / "in.jsonl")
    with pytest.raises(OptionError, match="is not a regular file; give a file of requests"):
        Input(tmp_path)


def test_a_target_with_anything_else_is_refused(small, folder, whole, tmp_path):
    source, target = Input(folder / "in.jsonl"), tmp_path / "out.jsonl"
    lines = [json.dumps(one) for one in whole]
    others = [["notes"], lines[:-1], [*lines, lines[-1]], [lines[1], lines[0], *lines[2:]]]
    for other in others:
        write(target, other)
        with pytest.raises(OptionError, match="exists, and is not what this model with these"):
            answers_in(target, source)
    write(target, lines)
    with pytest.raises(OptionError, match="options answers to .*in.jsonl; give another -o, or rem"):
        answers_in(target, source, mark_of(HEAD))
    assert answers_in(target, source) == answers_in(target, source, ID) == (45, 1)
