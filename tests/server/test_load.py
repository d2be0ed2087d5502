"""The load generator's client, and the figures that follow from trials."""

from __future__ import annotations

import asyncio
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from openelm_mlx.benchmarks.peers.llama_cpp import free_port
from openelm_mlx.benchmarks.scripts import serve_load
from openelm_mlx.benchmarks.scripts.load_figures import SCHEMA, figures, lines
from openelm_mlx.benchmarks.scripts.servers import (
    ALONE,
    NEUTRAL,
    OURS,
    PEER,
    Process,
    scheduler,
)
from openelm_mlx.benchmarks.scripts.streams import Answer, ask, ask_together
from openelm_mlx.errors import BenchmarkError

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "serving"
COMMITTED = sorted(RESULTS.glob("*.json"))
HEAD = "HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
USAGE = {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}}


def event(data: object) -> str:
    return f"data: {json.dumps(data)}\n\n"


def chunked(*texts: str) -> str:
    return "".join(f"{len(text.encode()):x}\r\n{text}\r\n" for text in texts)


def piece(text: str) -> str:
    return event({"choices": [{"index": 0, "text": text, "finish_reason": None}]})


def delta(**given: str) -> str:
    return event({"choices": [{"index": 0, "delta": given, "finish_reason": None}]})


def answer(*arrivals: str, head: str = HEAD) -> Answer:
    """Return an answer whose head came at second 1, and the rest a second apart."""
    return Answer(0.5, [(1.0 + at, data.encode()) for at, data in enumerate((head, *arrivals))])


def test_text_has_the_time_of_the_bytes_that_complete_its_event() -> None:
    first, second = piece("é"), piece(" b")
    cut = chunked(first)
    done = chunked(": keep-alive\n\n", second, event(USAGE), "data: [DONE]\n\n", "")
    found = answer(cut[:20], cut[20:], done)
    assert found.texts == [(3.0, "é"), (4.0, " b")]
    assert (found.first, found.end, found.tokens, found.text) == (2.5, 4.0, 2, "é b")


def test_the_role_of_a_chat_is_not_text_and_the_body_may_end_with_the_connection() -> None:
    role, text = delta(role="assistant"), delta(role="assistant", content="A")
    head = "HTTP/1.0 200 OK\r\nContent-type: text/event-stream\r\n\r\n"
    found = answer(role, text, event(USAGE) + "data: [DONE]\n\n", head=head)
    assert (found.texts, found.tokens) == ([(3.0, "A")], 2)


@pytest.mark.parametrize(
    ("arrivals", "head", "message"),
    [
        (["nonsense"], "HTTP/1.1 404 Not Found\r\n\r\n", "answered with status 404: nonsense"),
        ([chunked(piece("a"))], HEAD, r"ends without \[DONE\]"),
        ([chunked(event({"error": {"message": "no"}}))], HEAD, "sent an error: {'message': 'no'}"),
        ([], "SSH-2.0-OpenSSH\r\n", "answer is not HTTP"),
    ],
)
def test_what_is_not_a_whole_answer_is_an_error(
    arrivals: Sequence[str], head: str, message: str
) -> None:
    with pytest.raises(BenchmarkError, match=message):
        print(answer(*arrivals, head=head).events)


def test_a_server_that_does_not_listen_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match="cannot reach a server on port"):
        asyncio.run(ask(free_port(), "/health"))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere ps counts hundredths of a second")
def test_the_processor_time_of_another_process_is_read() -> None:
    work = "import time\nwhile time.process_time() < 0.2: pass\nprint(flush=True)\ninput()"
    with Process(ALONE, ["-S", "-c", work]) as process:
        assert process.process.stdout is not None
        process.process.stdout.readline()
        assert 0.2 <= process.processor_seconds() < 0.5


def test_answers_of_a_server_are_those_of_the_scheduler(
    address: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both ends of the comparison, with the scheduler in this process instead of a fresh one."""
    prompts, port = ["Once upon a time", "The wolf", "A king had"], int(address.rpartition(":")[2])
    wanted = {"max_tokens": 6, "temperature": 0, "stream": True, **NEUTRAL}
    bodies = [
        {"prompt": prompt, "stream_options": {"include_usage": True}, **wanted}
        for prompt in prompts
    ]
    answers = asyncio.run(ask_together(port, serve_load.TEXT, bodies))
    lines = [{"model": "openelm-tiny", "slots": 3}, {"prompts": prompts, "tokens": 6}]
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(f"{json.dumps(it)}\n" for it in lines)))
    scheduler()
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])["answers"]
    assert [(one["text"], one["tokens"]) for one in alone] == [
        (answer.text, answer.tokens) for answer in answers
    ]
    assert all(0 < answer.first <= answer.end - answer.start for answer in answers)
    health = asyncio.run(ask(port, "/health"))
    assert health.json["status"] == "ok"


def side(seconds: float, used: float) -> dict[str, float]:
    return {"seconds": seconds, "processor_seconds": used, "tokens": 100}


TRIALS = {
    "streams": [
        {OURS: side(1, 0.2), PEER: side(2, 0.3), ALONE: side(0.8, 0.16), "same_texts": 16},
        {OURS: side(2, 0.2), PEER: side(4, 0.3), ALONE: side(1.6, 0.16), "same_texts": 15},
    ],
    "first": [{OURS: 0.012, ALONE: 0.01}, {OURS: 0.013, ALONE: 0.012}, {OURS: 0.5, ALONE: 0.1}],
    "equal": [{OURS: [1.0, 1.1, 1.05]}, {OURS: [2.0, 2.0, 3.0]}, {OURS: [1.0, 1.0, 1.0]}],
    "shared": [{"tokens": 950, "shared": 910, "cached": 900}],
    "health": [{OURS: [0.001 * number for number in range(1, 101)]}, {OURS: []}],
    "start": [
        {OURS: {"seconds": seconds, "processor_seconds": 0.9}} for seconds in (1.0, 1.5, 1.1)
    ],
}


def test_figures_follow_from_the_trials() -> None:
    found = figures(TRIALS)
    speed = found["streams"]["tokens_per_second_ratios"]
    assert speed[f"{OURS} / {PEER}"] == pytest.approx({"low": 2, "middle": 2, "high": 2})
    assert found["streams"]["processor_ratios"][f"{OURS} / {ALONE}"]["middle"] == pytest.approx(
        1.25
    )
    assert found["streams"]["processor_us_per_token"][OURS] == pytest.approx(2000)
    assert found["streams"]["same_texts"] == 31
    assert found["first"][f"milliseconds_over_{ALONE}"] == pytest.approx({OURS: 2})
    assert found["equal"]["median_spread"][OURS] == pytest.approx(0.1)
    assert found["equal"]["largest_spread"][OURS] == pytest.approx(0.5)
    assert found["shared"] == {"prefilled_of_shared": 10}
    assert found["health"]["p99_milliseconds"][OURS] == pytest.approx(99)
    assert found["start"]["median_seconds"][OURS] == 1.1
    assert found["start"]["median_processor_seconds"][OURS] == 0.9
    text = "\n".join(lines(found))
    assert "streams: tokens per second ratios: openelm / mlx_lm.server 2.000 (2.000-2.000)" in text


@pytest.mark.parametrize("file", COMMITTED, ids=lambda file: file.stem)
def test_committed_figures_follow_from_their_trials(file: Path) -> None:
    found = json.loads(file.read_text(encoding="utf-8"))
    assert found["schema"] == SCHEMA and found["machine"]["chip"] and found["commit"]
    assert found["figures"] == json.loads(json.dumps(figures(found["trials"])))


def test_unknown_parts_and_sides_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for words, message in (
        (["--only", "streams,stream"], "--only names stream; known: streams, first, equal"),
        (["--sides", "vllm"], "--sides names vllm; known: openelm, mlx_lm.server"),
    ):
        with pytest.raises(SystemExit, match="2"):
            serve_load.main(words)
        assert message in capsys.readouterr().err
