"""A run that is stopped, or shared by several processes, gives exactly the numbers of one."""

from __future__ import annotations

import random
import threading
from itertools import pairwise

import pytest
from small import random_engine

from openelm_mlx import batch_generate
from openelm_mlx.device import mx
from openelm_mlx.engine.ranks import Ranks, launched
from openelm_mlx.errors import OptionError, PromptError
from openelm_mlx.evaluate.plan import Request, plan
from openelm_mlx.evaluate.run import Job, answers, dealt, texts
from openelm_mlx.evaluate.score import Scorer
from openelm_mlx.evaluate.store import Store

pytestmark = pytest.mark.usefixtures("cache")
TOKENS = 20  # of a pass: a dozen passes


def some_requests(count: int, seed: int = 1) -> list[Request]:
    rng = random.Random(seed)

    def ids(most: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, 64) for _ in range(rng.randint(1, most)))

    contexts = [ids(20) for _ in range(count // 2)]
    return [Request(rng.choice(contexts), ids(4)) for _ in range(count)]


REQUESTS = some_requests(24)


class Stop:
    """A progress that presses Ctrl-C after so many passes."""

    def __init__(self, passes: int = 1 << 30) -> None:
        self.passes, self.said = passes, []

    def __call__(self, *numbers: int) -> None:
        self.said.append(numbers)
        if len(self.said) > self.passes:
            raise KeyboardInterrupt


def test_answers_are_those_of_all_passes_in_turn(small):
    report = Stop()
    found = answers(small, REQUESTS, batch_tokens=TOKENS, progress=report)
    passes, scorer = plan(REQUESTS, TOKENS), Scorer(small)
    for work in passes:
        assert [found[number] for number in work.requests] == scorer.run(REQUESTS, work)
    total = sum(one.tokens for one in passes)
    assert report.said[0] == (0, 24, 0, total) and report.said[-1] == (24, 24, total, total)
    assert len(report.said) == len(passes) + 1 > 6
    assert answers(small, []) == []


def test_a_run_that_is_stopped_goes_on_after_the_last_pass(small):
    whole, passes = answers(small, REQUESTS, batch_tokens=TOKENS), 0
    for more in (1, 0, 3):
        stop = Stop(more)
        with Store(small, TOKENS) as store, pytest.raises(KeyboardInterrupt):
            answers(small, REQUESTS, batch_tokens=TOKENS, store=store, progress=stop)
        # what was stored by the runs before is there at once
        assert stop.said[0][2] == sum(one.tokens for one in plan(REQUESTS, TOKENS)[:passes])
        passes += more
    report = Stop()
    with Store(small, TOKENS) as store:
        assert answers(small, REQUESTS, batch_tokens=TOKENS, store=store, progress=report) == whole
    assert len(report.said) == len(plan(REQUESTS, TOKENS)) - passes + 1


def test_other_requests_do_not_change_what_is_found_again(small):
    """A stored pass answers the same requests in the same company only."""
    fewer = REQUESTS[:7]
    whole = answers(small, REQUESTS, batch_tokens=TOKENS)
    with Store(small, TOKENS) as store:
        answers(small, fewer, batch_tokens=TOKENS, store=store)
        assert answers(small, REQUESTS, batch_tokens=TOKENS, store=store) == whole


def prompts_of(engine) -> list[list[int]]:
    return [engine.tokenizer.encode(text) for text in ("Once upon", "The", "A king had", "He")]


def test_texts_are_greedy_and_end_before_a_stop(tiny):
    prompts, limits = prompts_of(tiny), (8, 3, 6, 1)
    stops = [["."], [], ["a", ","], []]
    found = texts(tiny, prompts, stops, limits)
    for prompt, stop, most, text in zip(prompts, stops, limits, found, strict=True):
        (alone,) = batch_generate(tiny, [prompt], max_tokens=most, stop=stop)
        assert text == alone.text
    assert texts(tiny, [], [], []) == []
    with pytest.raises(PromptError, match="prompt is empty"):
        texts(tiny, [[]], [[]], [4])
    with pytest.raises(OptionError, match="batch_tokens is 0; allowed is a whole number from 1 up"):
        texts(tiny, prompts, stops, limits, batch_tokens=0)


def test_texts_that_were_stopped_go_on(tiny):
    asked = prompts_of(tiny), [[]] * 4, [4] * 4
    whole = texts(tiny, *asked, batch_tokens=16)
    with Store(tiny, 16) as store, pytest.raises(KeyboardInterrupt):
        texts(tiny, *asked, batch_tokens=16, store=store, progress=Stop(1))
    report = Stop()
    with Store(tiny, 16) as store:
        assert texts(tiny, *asked, batch_tokens=16, store=store, progress=report) == whole
        other = texts(tiny, asked[0], [["e"]] * 4, asked[2], batch_tokens=16, store=store)
    assert report.said[0][0] > 0 and len(report.said) > 1
    assert other == texts(tiny, asked[0], [["e"]] * 4, asked[2], batch_tokens=16) != whole


class Met(Ranks):
    """Processes that are threads here: `given` is what each has to give."""

    given: dict[int, str]
    barrier: threading.Barrier

    def gather(self, text: str) -> list[str]:
        self.barrier.wait(60)
        self.given[self.rank] = text
        self.barrier.wait(60)
        return [self.given[rank] for rank in range(self.size)]


def in_threads(size: int, run) -> list:
    """Return what `run` gives, or the error, for each of so many processes."""

    class Here(Met):
        given, barrier = {}, threading.Barrier(size)

    found: list = [None] * size

    def one(rank: int) -> None:
        try:
            found[rank] = run(Here(rank, size))
        except OptionError as error:
            found[rank] = error

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_processes_share_passes_and_each_has_all_answers(small, tmp_path, monkeypatch):
    """Three machines with a disk each; two of them have answers of earlier runs."""
    whole, stores, reports = answers(small, REQUESTS, batch_tokens=TOKENS), [], []
    for rank in range(3):
        monkeypatch.setenv("OPENELM_CACHE", str(tmp_path / f"machine {rank}"))
        with Store(small, TOKENS) as store, pytest.raises(KeyboardInterrupt):
            answers(small, REQUESTS, batch_tokens=TOKENS, store=store, progress=Stop(rank))
        stores.append(Store(small, TOKENS))
        reports.append(Stop())

    def run(ranks: Ranks) -> list:
        about = {"store": stores[ranks.rank], "ranks": ranks, "progress": reports[ranks.rank]}
        return answers(small, REQUESTS, batch_tokens=TOKENS, **about)

    assert in_threads(3, run) == [whole] * 3
    stored, left = reports[0].said[0][0], len(plan(REQUESTS, TOKENS)) - 2
    ran = [len(report.said) - 1 for report in reports]
    assert min(ran) > 0 and sum(ran) == left
    for store in stores:
        store.close()
    assert sum(report.said[-1][0] - stored for report in reports) == len(REQUESTS) - stored
    assert all(report.said[-1][::2] == report.said[-1][1::2] for report in reports)


def test_passes_are_dealt_by_their_cost():
    jobs = [Job("", [0], tokens) for tokens in (5, 9, 1, 4, 4, 6)]
    mine = [dealt(jobs, {0: 0}, Ranks(rank, 2)) for rank in range(2)]
    assert mine == [[1, 4], [2, 3, 5]]
    assert dealt(jobs, {}, Ranks()) == [0, 1, 2, 3, 4, 5]
    # of two times 32 passes with a prefix, those that stay together have it once
    jobs = [Job("", [0], 1 + 5 * (number % 32 == 0), number % 32 > 0) for number in range(64)]
    mine = [dealt(jobs, {}, Ranks(rank, 2)) for rank in range(2)]
    assert sorted(mine[0] + mine[1]) == list(range(64)) and abs(len(mine[0]) - len(mine[1])) < 8
    breaks = sum(b != a + 1 for own in mine for a, b in pairwise(own))
    assert breaks < 16


def test_a_prefix_is_counted_once_and_changes_no_number(small):
    beginnings = [tuple(range(3 + n, 63)) * 2 for n in range(2)]
    asked = [Request(beginnings[n % 2] + (5 + n,), (9 + n, 7)) for n in range(30)]
    passes, report = plan(asked, TOKENS), Stop()
    prefixes = [asked[one.requests[0]].fed[: one.prefix] for one in passes]
    assert len(set(prefixes)) == 2 < len(passes)
    whole = answers(small, asked, batch_tokens=TOKENS, progress=report)
    tokens = sum(one.tokens for one in passes)
    assert report.said[-1] == (30, 30, tokens, tokens)

    def run(ranks: Ranks) -> list:
        return answers(small, asked, batch_tokens=TOKENS, ranks=ranks)

    assert in_threads(2, run) == [whole] * 2


def test_processes_that_do_not_do_the_same_are_refused(small, tiny):
    """The first has fewer requests; then it has another model, as its store knows."""
    stores = Store(small, 4096), Store(random_engine(tiny, 4), 4096)

    def fewer(ranks: Ranks) -> list:
        return answers(small, REQUESTS[ranks.rank :], ranks=ranks)

    def another(ranks: Ranks) -> list:
        return answers(small, REQUESTS, ranks=ranks, store=stores[ranks.rank])

    for run, what in ((fewer, "requests"), (another, "weights")):
        expected = f"process 2 of mlx.launch has other {what} than the first; give all the same, "
        expected += "and each such command here its own --starting-port"
        assert list(map(str, in_threads(2, run))) == [expected] * 2


def test_a_process_that_has_ended_is_said_in_one_line(monkeypatch):
    def lost(array: object, stream: object) -> None:
        raise RuntimeError("[ring] connection to a peer was lost")

    monkeypatch.setattr(mx.distributed, "all_gather", lost)
    with pytest.raises(OptionError) as raised:
        Ranks(0, 2).gather("")
    said = "another process of mlx.launch has ended; see what it said, and run the same command"
    assert str(raised.value) == said
    assert launched() == (0, 1) and launched().gather("alone") == ["alone"]


def test_one_process_alone_in_a_ring_is_refused_in_one_line(tmp_path, monkeypatch):
    """As `mlx.launch -n 1` starts it: without hosts."""
    (tmp_path / "hosts").write_text("")
    monkeypatch.setenv("MLX_HOSTFILE", str(tmp_path / "hosts"))
    monkeypatch.setenv("MLX_RANK", "0")
    with pytest.raises(OptionError) as raised:
        launched()
    said = str(raised.value)
    assert said.startswith("the processes of mlx.launch cannot be connected (") and "\n" not in said
    assert said.endswith("; give it -n 2 or more, or run the command without it")
