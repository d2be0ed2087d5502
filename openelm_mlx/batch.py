"""Many sequences at once: they join and leave while others run, each with its own options, seed and end."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from openelm_mlx.decode import logprob_fields
from openelm_mlx.errors import OpenELMError, OptionError, PromptError
from openelm_mlx.generation import Event, Prompt, TextFilter, decoder_after, prompt_tokens
from openelm_mlx.kv import CacheKind
from openelm_mlx.options import GenerationOptions, SamplingOptions, check_loaded, explained, shown, with_overrides
from openelm_mlx.rows import Rows, RowsSpec, RowState, choose_rows, prefill_rows
from openelm_mlx.sampling import History, new_seed, seed_key
from openelm_mlx.speculative import SpeculationCounts
from openelm_mlx.stats import Clock, GenerationStats, Reader

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from openelm_mlx.loading import Engine
    from openelm_mlx.options import Settings

SHARED = ("prefill_chunk", "compiled", "kv_bits")  # options of the batch: one pass and one cache serve all its rows
ALONE = ("kv_window", "prompt_lookup", "draft_tokens", "adaptive_draft")  # what one sequence at a time can have


class Running:
    """One sequence: its request, and on the host's side how far it came."""

    def __init__(
        self, number: int, engine: Engine, tokens: list[int], sampling: SamplingOptions, options: GenerationOptions,
        reader: Reader,
    ) -> None:  # fmt: skip
        self.number, self.tokens, self.options = number, tokens, options
        self.seed = new_seed() if sampling.seed is None else sampling.seed
        self.key = seed_key(self.seed, sampling.stream)
        self.sampling = replace(sampling, seed=None, stream=0)
        self.room = min(options.max_tokens, engine.config.max_context_length - len(tokens) + 1)
        self.text = TextFilter(decoder_after(engine, tokens), options.stop)
        self.eos = None if options.ignore_eos else engine.config.eos_token_id
        self.clock = Clock(reader)

    def take(self, token: int, logprob: float | None, top: tuple[tuple[int, float], ...]) -> Event:
        """The event of its next token; the last one carries reason and statistics."""
        self.clock.token()
        ended = token == self.eos
        shown = self.text.flush() if ended else self.text.push(token)
        stopped = ended or self.text.stopped
        if not stopped and self.clock.tokens < self.room:
            return Event(shown, token, logprob, top)
        shown += "" if stopped else self.text.flush()
        reason = "stop" if stopped or self.text.stopped else "length"
        stats = self.clock.stats(len(self.tokens), 0, self.seed, SpeculationCounts())
        return Event(shown, token, logprob, top, reason, stats)


class BatchEngine:
    """Runs up to `slots` sequences together on one thread; more wait their turn.

    `submit` takes a prompt at any time, `step` draws one token for every running sequence, `cancel` drops one. What
    a sequence gets does not depend on its neighbours: its random numbers are a function of its seed and position,
    and no token attends to another row. `options` gives the kind of cache of all rows, and defaults for `submit`.
    """

    def __init__(self, engine: Engine, slots: int = 16, options: GenerationOptions | None = None) -> None:
        check_loaded("engine", engine)
        if type(slots) is not int or slots < 1:
            raise OptionError(f"slots is {shown(slots)}; allowed is a whole number from 1 up")
        self.engine, self.slots, self.options = engine, slots, with_overrides(None, options, {})[1]
        self.kind = self._kind(self.options)
        self._waiting: deque[Running] = deque()
        self._rows: list[Running | None] = []
        self._numbers = 0
        self._reader = Reader()
        self._device = Rows(engine, self._spec())

    @property
    def busy(self) -> bool:
        """Whether anything runs or waits."""
        return bool(self._waiting) or any(self._rows)

    def submit(
        self,
        prompt: Prompt,
        sampling: SamplingOptions | None = None,
        options: GenerationOptions | None = None,
        **settings: Unpack[Settings],
    ) -> int:
        """Queue a prompt; returns the number that its events carry. Raises `PromptError` and `OptionError`."""
        sampling, options = with_overrides(sampling, self.options if options is None else options, settings)
        self._kind(options)
        for name in SHARED:
            given, shared = getattr(options, name), getattr(self.options, name)
            if given != shared:
                raise OptionError(
                    f"{name} of a sequence is {given}, that of its batch {shared}; give it to the BatchEngine"
                )
        tokens = prompt_tokens(self.engine, prompt)
        self._numbers += 1
        self._waiting.append(Running(self._numbers, self.engine, tokens, sampling, options, self._reader))
        return self._numbers

    def cancel(self, number: int) -> bool:
        """Drop a sequence; False when it has ended already or never was."""
        for row, running in enumerate(self._rows):
            if running is not None and running.number == number:
                self._retire(row)
                return True
        waiting = len(self._waiting)
        self._waiting = deque(running for running in self._waiting if running.number != number)
        return len(self._waiting) < waiting

    def step(self) -> list[tuple[int, Event]]:
        """Admit what waits, draw one token for every running sequence; (number, event) for each."""
        self._reader.back()
        self._admit()
        live = [(row, running) for row, running in enumerate(self._rows) if running is not None]
        device = self._device
        if not live or device.state is None:
            return []
        token, detail = device.state.token, device.detail
        if any(running.clock.tokens + 1 < running.room for _, running in live):
            device.reserve(max(len(running.tokens) + running.clock.tokens for _, running in live) + 2)
            device.advance()  # the device starts on the next token while this one is read
        values: Any = token.tolist()
        events = []
        for row, running in live:
            fields = logprob_fields(detail if running.options.logprobs is not None else None, row)
            if running.options.logprobs is not None:
                fields = (fields[0], fields[1][: running.options.logprobs])
            event = running.take(int(values[row]), *fields)
            events.append((running.number, event))
            if event.finish_reason:
                self._retire(row)
        self._reader.leave()
        return events

    def close(self) -> None:
        """Drop everything and wait for what is under way; the engine stays usable."""
        self._waiting.clear()
        self._rows = []
        self._device = Rows(self.engine, self._spec())
        mx.synchronize()

    def _kind(self, options: GenerationOptions) -> CacheKind:
        for name in ALONE:
            if getattr(options, name) != getattr(GenerationOptions, name):
                raise OptionError(f"{name} does not go with batches; leave it out, or generate one by one")
        return CacheKind.of(self.engine.config, options)

    def _spec(self, extra: Sequence[Running] = ()) -> RowsSpec:
        """The trace that the running sequences and `extra` need."""
        running = [one for one in self._rows if one is not None] + list(extra)
        distinct = tuple(dict.fromkeys(one.sampling for one in running))
        wanted = [one.options.logprobs for one in running if one.options.logprobs is not None]
        return RowsSpec(
            distinct or (SamplingOptions(),), self.engine.vocab, max(wanted, default=None), self.options.compiled, self.kind
        )

    def _admit(self) -> None:
        free = self.slots - sum(one is not None for one in self._rows)
        new = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        self._shrink(len(new))
        if not new:
            return
        self._respecify(new)
        for group in like_lengths(new):
            self._prefill(group)

    def _shrink(self, coming: int) -> None:
        """Let go of unused rows when half would do."""
        live = [row for row, one in enumerate(self._rows) if one is not None]
        count = rows_for(len(live) + coming)
        if not live and not coming:
            self._rows, self._device = [], Rows(self.engine, self._spec())
        elif live and 2 * count <= len(self._rows):
            self._device.resize(live, count)
            self._rows = [self._rows[row] for row in live] + [None] * (count - len(live))
            self._respecify([])

    def _respecify(self, new: list[Running]) -> None:
        """Put the options of the rows into the state, after they have changed."""
        spec, device = self._spec(new), self._device
        if device.state is not None:
            which = [0 if one is None else spec.samplings.index(one.sampling) for one in self._rows]
            history = device.state.history if spec.penalised else None
            if spec.penalised and history is None:
                blank = mx.zeros((len(self._rows), spec.vocab))  # the rows there have no penalties: theirs stay unused
                history = History(blank.astype(mx.bool_), blank)
            device.state = device.state._replace(which=mx.array(which, dtype=mx.int32), history=history)
        device.spec = spec

    def _prefill(self, group: list[Running]) -> None:
        for one in group:
            one.clock.start()
        self.engine.steps.refresh()
        device, spec = self._device, self._device.spec
        prompts = [one.tokens for one in group]
        logits, caches = prefill_rows(self.engine, prompts, self.kind, self.options.prefill_chunk)
        state = RowState(
            token=mx.array([tokens[-1] for tokens in prompts], dtype=mx.uint32),
            position=mx.array([len(tokens) - 1 for tokens in prompts], dtype=mx.int32),
            key=mx.concatenate([one.key for one in group]),
            which=mx.array([spec.samplings.index(one.sampling) for one in group], dtype=mx.int32),
            alive=mx.ones((len(group),), dtype=mx.int32),
            history=History.of_prompt(prompts, spec.vocab) if spec.penalised else None,
        )
        state, detail = choose_rows(spec, logits, state)
        rows = self._free_rows(len(group))
        device.place(rows, state, detail, caches, len(self._rows), [len(tokens) for tokens in prompts])
        for row, one in zip(rows, group, strict=True):
            self._rows[row] = one

    def _free_rows(self, wanted: int) -> list[int]:
        """Unused rows; more are made, in powers of two, where too few are left."""
        free = [row for row, one in enumerate(self._rows) if one is None]
        if len(free) < wanted:
            count = rows_for(len(self._rows) - len(free) + wanted)
            self._device.resize(list(range(len(self._rows))), count)
            free += range(len(self._rows), count)
            self._rows += [None] * (count - len(self._rows))
        return free[:wanted]

    def _retire(self, row: int) -> None:
        self._rows[row] = None
        self._device.bury(row)


def rows_for(sequences: int) -> int:
    """Rows of the device's batch: a power of two, so that few shapes are ever traced."""
    return 1 << max(sequences - 1, 0).bit_length()


def like_lengths(new: list[Running]) -> list[list[Running]]:
    """Groups whose padding wastes at most a quarter."""
    groups: list[list[Running]] = []
    for one in sorted(new, key=lambda running: len(running.tokens)):
        if groups and len(one.tokens) <= 1.25 * len(groups[-1][0].tokens) + 4:
            groups[-1].append(one)
        else:
            groups.append([one])
    return groups


@dataclass(frozen=True)
class BatchResult:
    """What one prompt of a batch gave; `error` is set instead where it could not be run."""

    text: str
    tokens: tuple[int, ...]
    finish_reason: str | None
    stats: GenerationStats | None
    error: OpenELMError | None = None


@explained(SamplingOptions, GenerationOptions)
def batch_generate(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: SamplingOptions | Sequence[SamplingOptions] | None = None,
    options: GenerationOptions | Sequence[GenerationOptions] | None = None,
    *,
    slots: int = 16,
    **settings: Unpack[Settings],
) -> list[BatchResult]:
    """Continue many prompts, up to `slots` of them at a time; results in the order of the prompts.

    >>> texts = [result.text for result in batch_generate(engine, ["Once upon", "A dog"], max_tokens=32)]

    `sampling` and `options` are one for all or one each; `settings` are options by their names and hold for all. A
    prompt that cannot be run gives a result with `error` and does not disturb the others. Raises `OptionError` for
    options that are wrong for all, and `PromptError` where `prompts` is one text.
    """
    if isinstance(prompts, (str, bytes)):
        raise PromptError("prompts is one text; give a list of prompts, also for a single one: [text]")
    if not hasattr(prompts, "__getitem__") or not hasattr(prompts, "__len__"):
        raise PromptError(f"prompts is {shown(prompts)}; give a list of prompts")
    each_sampling = spread("sampling", sampling, len(prompts))
    each_options = spread("options", options, len(prompts))
    first = next((one for one in each_options if one is not None), None)
    _, shared = with_overrides(None, first, settings)
    batch = BatchEngine(engine, slots, shared)
    texts: list[str] = [""] * len(prompts)
    tokens: list[list[int]] = [[] for _ in prompts]
    results: list[BatchResult | None] = [None] * len(prompts)
    places: dict[int, int] = {}
    try:
        for place, prompt in enumerate(prompts):
            try:
                places[batch.submit(prompt, each_sampling[place], each_options[place], **settings)] = place
            except OpenELMError as error:
                results[place] = BatchResult("", (), None, None, error)
        while batch.busy:
            for number, event in batch.step():
                place = places[number]
                texts[place] += event.text
                tokens[place].append(-1 if event.token is None else event.token)
                if event.finish_reason:
                    done = tuple(tokens[place])
                    results[place] = BatchResult(texts[place], done, event.finish_reason, event.stats)
    finally:
        batch.close()
    return [result for result in results if result is not None]


def spread(name: str, given: Any, count: int) -> list[Any]:
    """One for each prompt. Raises `OptionError` when there are too many or too few."""
    if given is None or isinstance(given, (SamplingOptions, GenerationOptions)):
        return [given] * count
    if not isinstance(given, (list, tuple)):
        raise OptionError(f"{name} is {shown(given)}; give one for all, or a list of one each")
    if len(given) != count:
        raise OptionError(f"{name} has {len(given)} entries for {count} prompts; give one for all, or one each")
    return list(given)
