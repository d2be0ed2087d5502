"""Runs the passes of an evaluation: without those that were answered before, on several machines.

What shares a pass is decided for all requests together, and passes are left out or dealt whole. So
a run that was stopped, or shared, gives exactly the numbers of one that was not.
"""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

from openelm_mlx import __version__
from openelm_mlx.engine.generation import batch_generate
from openelm_mlx.engine.options import GenerationOptions, check_loaded
from openelm_mlx.engine.ranks import Ranks, check_alike
from openelm_mlx.evaluate.plan import Request, plan
from openelm_mlx.evaluate.score import Answer, Scorer, check_requests
from openelm_mlx.fields import check_count

if TYPE_CHECKING:
    from openelm_mlx.engine.loading import Engine
    from openelm_mlx.evaluate.store import Store

# what is answered, how much there is to answer; tokens of the passes that are done, of all. Those
# of other processes are left out, the answers that were stored before are not.
Progress = Callable[[int, int, int, int], None]

ROWS = 16  # texts that are generated together


class Job(NamedTuple):
    """One pass: the key by which a store knows it, the requests it answers, and its cost.

    `follows` says that it begins with the prefix of the pass before, which then is not run again.
    """

    key: str
    requests: Sequence[int]
    tokens: int
    follows: bool = False


def answers(
    engine: Engine,
    requests: Sequence[Request],
    *,
    batch_tokens: int = 4096,
    store: Store | None = None,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
    each: Callable[[int, Answer], None] | None = None,
) -> list[Answer]:
    """Return the log-likelihood of each request's continuation after its context, in nats.

    They are those of the model itself, given all tokens before; an id that is never drawn has -inf.
    `batch_tokens` is that of `plan`, and changes the numbers by rounding only. `store` has the
    answers of earlier runs, and gets those of each pass as it ends; `ranks` are the processes that
    share the work, of which each returns all of it. After each pass `progress` is told, and `each`
    what the pass has found, with the number of the request. Raises `PromptError`, before any work,
    for what `check_requests` refuses, and `OptionError` if a process has ended, or was given other
    requests, weights or another version.
    """
    check_loaded("engine", engine)
    check_count("batch_tokens", batch_tokens, 1)
    check_requests(engine, requests)
    scorer, passes = Scorer(engine), plan(requests, batch_tokens)

    def run(number: int) -> list[Answer]:
        return scorer.run(requests, passes[number])

    jobs, before = [], tuple[int, ...]()
    for work in passes:
        asked = (part for number in work.requests for part in requests[number])
        key = key_of(json.dumps(["score", work.rows, work.prefix]), asked)
        prefix = requests[work.requests[0]].fed[: work.prefix]
        follows, before = bool(prefix) and prefix == before, prefix
        jobs.append(Job(key, work.requests, work.tokens, follows))
    return [Answer(*found) for found in shared(jobs, run, store, ranks, progress, each)]


def texts(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    stops: Sequence[Sequence[str]],
    max_tokens: Sequence[int],
    *,
    batch_tokens: int = 4096,
    store: Store | None = None,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
    each: Callable[[int, str], None] | None = None,
) -> list[str]:
    """Return the text that greedy decoding gives after each prompt, in every process.

    A prompt is token ids; its text ends before the first of its `stops`, or after its `max_tokens`.
    The other arguments are those of `answers`; prompts and texts of one group together have at most
    `batch_tokens`. Raises what `batch_generate` gives as an error of a prompt as well.
    """
    check_loaded("engine", engine)
    check_count("batch_tokens", batch_tokens, 1)
    limits = [len(prompt) + most for prompt, most in zip(prompts, max_tokens, strict=True)]
    options = [
        GenerationOptions(max_tokens=most, stop=tuple(stop))
        for most, stop in zip(max_tokens, stops, strict=True)
    ]
    groups, order = [], sorted(range(len(prompts)), key=lambda number: -limits[number])
    while order:
        groups.append(order[: max(1, min(ROWS, batch_tokens // limits[order[0]]))])
        del order[: len(groups[-1])]

    def run(number: int) -> list[str]:
        group = groups[number]
        results = batch_generate(
            engine, [prompts[one] for one in group], None, [options[one] for one in group]
        )
        for result in results:
            if result.error is not None:
                raise result.error
        return [result.text for result in results]

    jobs = []
    for group in groups:
        kind = json.dumps(["text", *([stops[one], max_tokens[one]] for one in group)])
        key = key_of(kind, (prompts[one] for one in group))
        jobs.append(Job(key, group, sum(limits[one] for one in group)))
    return shared(jobs, run, store, ranks, progress, each)


def key_of(kind: str, sequences: Iterable[Sequence[int]]) -> str:
    """Return a hash of what a pass is asked."""
    digest = hashlib.sha256(kind.encode())
    for tokens in sequences:
        digest.update(array("q", [len(tokens), *tokens]).tobytes())
    return digest.hexdigest()


def shared(
    jobs: list[Job],
    run: Callable[[int], list[Any]],
    store: Store | None,
    ranks: Ranks | None,
    progress: Progress | None,
    each: Callable[[int, Any], None] | None,
) -> list[Any]:
    """Return the answer to each request: what `run` gives for the number of its job, here or in
    another process, or what the store had.
    """
    ranks = ranks or Ranks()
    found = {}
    for number, job in enumerate(jobs):
        if store is not None and (stored := store.get(job.key)) is not None:
            found[number] = stored
    owners = agreed(jobs, list(found), store, ranks)
    left = dealt(jobs, owners, ranks)

    def amount(numbers: Iterable[int]) -> tuple[int, int]:
        own = [jobs[number] for number in numbers]
        return sum(len(job.requests) for job in own), sum(job.tokens for job in own)

    (answered, tokens), (of, most) = amount(owners), amount([*owners, *left])
    tell = progress or (lambda *_: None)
    tell(answered, of, tokens, most)
    for number in left:
        job, found[number] = jobs[number], run(number)
        if each is not None:
            for one in zip(job.requests, found[number], strict=True):
                each(*one)
        if store is not None:
            store.add(job.key, found[number])
        answered, tokens = answered + len(job.requests), tokens + job.tokens
        tell(answered, of, tokens, most)
    if ranks.size > 1:
        own = [number for number, owner in owners.items() if owner == ranks.rank]
        text = json.dumps([[number, found[number]] for number in [*own, *left]])
        found = dict(pair for given in ranks.gather(text) for pair in json.loads(given))
    whole = (
        pair
        for number, job in enumerate(jobs)
        for pair in zip(job.requests, found[number], strict=True)
    )
    return [answer for _, answer in sorted(whole, key=itemgetter(0))]


def agreed(jobs: list[Job], found: list[int], store: Store | None, ranks: Ranks) -> dict[int, int]:
    """Return the numbers of jobs that need no run, and the first process that has the answers.

    Processes on other machines have other stores. Raises `OptionError` if they do not do the same.
    """
    about = {"version": __version__, "requests": key_of(json.dumps([job.key for job in jobs]), ())}
    about["weights"] = "" if store is None else store.identity["weights"]
    given = [json.loads(text) for text in ranks.gather(json.dumps([about, found]))]
    check_alike([theirs for theirs, _ in given])
    owners: dict[int, int] = {}
    for rank, (_, numbers) in enumerate(given):
        for number in numbers:
            owners.setdefault(number, rank)
    return owners


def dealt(jobs: list[Job], owners: dict[int, int], ranks: Ranks) -> list[int]:
    """Return the numbers of the jobs for this process, in order.

    The longest go first, to the least loaded. Those that follow each other stay together, while
    they are an eighth of a process's share.
    """
    left, parts = [number for number in range(len(jobs)) if number not in owners], list[list[int]]()
    most = sum(jobs[number].tokens for number in left) / (8 * ranks.size)
    costs = list[int]()  # of the parts
    for number in left:
        tokens = jobs[number].tokens
        together = bool(parts) and parts[-1][-1] == number - 1 and jobs[number].follows
        if together and costs[-1] + tokens <= most:
            parts[-1].append(number)
            costs[-1] += tokens
        else:
            parts.append([number])
            costs.append(tokens)
    loads, mine = [0] * ranks.size, list[int]()
    for at in sorted(range(len(parts)), key=costs.__getitem__, reverse=True):
        least = loads.index(min(loads))
        loads[least] += costs[at]
        if least == ranks.rank:
            mine += parts[at]
    return sorted(mine)
