"""The map: a prompt goes in, events come out. Chat, generate, benchmarks and servers all call `stream_generate`."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from openelm_mlx.decode import Progress, State, StepSpec, choose, decode, prefill
from openelm_mlx.drafts import Chain, Draft, ModelDraft, PromptLookup
from openelm_mlx.errors import CacheError, PromptError
from openelm_mlx.kv import CacheKind
from openelm_mlx.options import GenerationOptions, SamplingOptions, explained, with_overrides
from openelm_mlx.prompt_cache import PromptCache
from openelm_mlx.sampling import History, new_seed, seed_key
from openelm_mlx.speculative import SpeculationCounts, speculate
from openelm_mlx.tokenizer import StreamingDecoder

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of type checkers; nothing to install

    from openelm_mlx.loading import Engine
    from openelm_mlx.options import Settings


@dataclass(frozen=True)
class GenerationStats:
    """What one generation cost. Rates are tokens per second; a rate nothing was measured for is 0.

    The first token belongs to the prompt's time, so the generation rate counts the tokens after it.
    """

    prompt_tokens: int
    reused_tokens: int  # of the prompt, found in the cache
    generation_tokens: int
    prompt_tokens_per_second: float  # of those prefilled
    generation_tokens_per_second: float
    time_to_first_token_seconds: float
    total_seconds: float
    peak_memory_bytes: int
    seed: int
    drafted_tokens: int = 0  # proposed by a draft model or prompt lookup
    accepted_tokens: int = 0  # of those, kept
    target_passes: int = 0  # of the model itself, the prompt's excluded

    @property
    def tokens_per_pass(self) -> float:
        """Tokens that a pass of the model gave; 1 without speculation, 0 where there was no pass."""
        return (self.generation_tokens - 1) / self.target_passes if self.target_passes else 0.0


@dataclass(frozen=True)
class Event:
    """One token and the text that became safe to print with it; the last event has `finish_reason` and `stats`."""

    text: str
    token: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None  # "stop": end of text or a stop string; "length": max_tokens or context is full
    stats: GenerationStats | None = None


@explained(SamplingOptions, GenerationOptions)
def generate(
    engine: Engine,
    prompt: str | Sequence[int],
    sampling: SamplingOptions | None = None,
    options: GenerationOptions | None = None,
    *,
    prompt_cache: PromptCache | None = None,
    draft: Engine | Draft | None = None,
    progress: Progress | None = None,
    **settings: Unpack[Settings],
) -> str:
    """The whole text that follows `prompt`; arguments and errors are those of `stream_generate`.

    >>> engine = load("openelm-tiny")
    >>> text = generate(engine, "Once upon a time", max_tokens=64, temperature=0.7, seed=1)

    `settings` are options by their names; they replace those of `sampling` and `options`.
    """
    events = stream_generate(
        engine, prompt, sampling, options, prompt_cache=prompt_cache, draft=draft, progress=progress, **settings
    )
    return "".join(event.text for event in events)


@explained(SamplingOptions, GenerationOptions)
def stream_generate(
    engine: Engine,
    prompt: str | Sequence[int],
    sampling: SamplingOptions | None = None,
    options: GenerationOptions | None = None,
    *,
    prompt_cache: PromptCache | None = None,
    draft: Engine | Draft | None = None,
    progress: Progress | None = None,
    **settings: Unpack[Settings],
) -> Generator[Event, None, None]:
    """Yield an `Event` a token.

    >>> for event in stream_generate(engine, "Once upon a time", max_tokens=64):
    ...     print(event.text, end="", flush=True)

    `settings` are options by their names; they replace those of `sampling` and `options`.

    `prompt_cache` is reused as far as its tokens agree with the prompt and holds prompt and answer afterwards.
    `draft` (a smaller engine with the same tokenizer, or a `ModelDraft` of one, which keeps its cache between calls)
    and the option `prompt_lookup` speed up decoding without changing what is drawn. `progress(done, total)` is
    called after each prefilled chunk. Closing the iterator stops at once and leaves nothing in flight.
    Raises `PromptError` (empty, too long, ids out of range), `OptionError` and `CacheError` before any work.
    """
    sampling, options = with_overrides(sampling, options, settings)
    tokens = prompt_tokens(engine, prompt)
    kind = CacheKind.of(engine.config, options)
    cache = PromptCache.for_config(engine.config, kind) if prompt_cache is None else prompt_cache
    if cache.kind != kind:
        raise CacheError(f"the prompt cache holds {cache.kind}, but the options ask for {kind}; make one for them")
    return _generate(engine, tokens, sampling, options, cache, draft_for(engine, draft, options), progress)


def _generate(
    engine: Engine,
    tokens: list[int],
    sampling: SamplingOptions,
    options: GenerationOptions,
    cache: PromptCache,
    draft: Chain | None,
    progress: Progress | None,
) -> Generator[Event, None, None]:
    seed = new_seed() if sampling.seed is None else sampling.seed
    room = min(options.max_tokens, engine.config.max_context_length - len(tokens) + 1)
    spec = StepSpec(sampling, engine.vocab, options.logprobs, options.compiled, cache.kind)
    clock, counts = Clock(), SpeculationCounts()
    # 1. keep what the cache already holds of this prompt
    reused = cache.reuse(tokens)
    text = TextFilter(StreamingDecoder(engine.tokenizer), options.stop)
    produced: list[int] = []
    try:
        # 2. the rest of the prompt, in chunks
        logits = prefill(engine.model, tokens[reused:], cache.layers, options.prefill_chunk, progress)
        # 3. the first token, from the prompt's last logits
        state = choose(spec, logits, first_state(spec, [tokens], [seed]))
        # 4. the loop, one token ahead of us or a draft at a time
        if draft is None:
            drawn = decode(engine.steps.get(spec), state, cache.layers, room)
        else:
            drawn = speculate(engine, spec, state, cache.layers, tokens, draft, room, counts)
        with closing(drawn):
            for token, logprob, top in drawn:
                clock.token()
                produced.append(token)
                top = top[: options.logprobs]
                # 5. ids -> text, held back while it could still become a stop string
                ended = token == engine.config.eos_token_id and not options.ignore_eos
                shown = text.flush() if ended else text.push(token)
                stopped, last = ended or text.stopped, len(produced) == room
                if stopped or last:
                    break
                yield Event(shown, token, logprob, top)
    finally:
        cache.hold(tokens + produced)
    # 6. the last event carries the reason and the statistics
    shown += "" if stopped else text.flush()
    reason = "stop" if stopped or text.stopped else "length"
    yield Event(shown, token, logprob, top, reason, clock.stats(len(tokens), reused, len(produced), seed, counts))


def draft_for(engine: Engine, draft: Engine | Draft | None, options: GenerationOptions) -> Chain | None:
    """What `draft=` and the options ask for: prompt lookup first, a model where nothing matches. Raises `OptionError`."""
    options.check_draft(draft is not None)
    model: Any = draft if draft is None or hasattr(draft, "propose") else ModelDraft(engine, draft)
    lookup = PromptLookup(options.prompt_lookup) if options.prompt_lookup else None
    found: list[Draft] = [part for part in (lookup, model) if part is not None]
    return None if not found else Chain(found, options.draft_tokens, options.adaptive_draft)


def prompt_tokens(engine: Engine, prompt: str | Sequence[int]) -> list[int]:
    """Ids of a prompt: text after BOS, or ids as given. Raises `PromptError`."""
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError("the prompt is empty; give at least one character")
        tokens = engine.tokenizer.encode(prompt)
    else:
        tokens = [int(token) for token in prompt]
        if not tokens:
            raise PromptError("the prompt is empty; give at least one token")
        if wrong := [token for token in tokens if not 0 <= token < engine.config.vocab_size]:
            raise PromptError(f"token id {wrong[0]} is outside the vocabulary of {engine.config.vocab_size}")
    limit = engine.config.max_context_length
    if len(tokens) > limit:
        raise PromptError(f"the prompt has {len(tokens)} tokens; the model's context holds {limit}. Shorten the prompt")
    return tokens


def first_state(spec: StepSpec, prompts: list[list[int]], seeds: list[int]) -> State:
    """The state before the first tokens are drawn: the positions are those of the prompts' last tokens."""
    history = History.of_prompt(prompts, spec.vocab) if spec.sampling.penalised else None
    newest = mx.array([tokens[-1] for tokens in prompts], dtype=mx.uint32)
    last = mx.array([len(tokens) - 1 for tokens in prompts], dtype=mx.int32)
    return State(newest, last, mx.concatenate([seed_key(seed) for seed in seeds]), history, None, [])


class TextFilter:
    """Decoded text on its way out. What could be the start of a stop string waits until it is decided.

    stop "END":  "...the E" shows "...the ", "N" shows nothing, "joy" shows "ENjoy", "D" stops for good.
    """

    def __init__(self, decoder: StreamingDecoder, stop: tuple[str, ...]) -> None:
        self.decoder, self.stop = decoder, stop
        self.held, self.stopped = "", False

    def push(self, token: int) -> str:
        return self._release(self.decoder.push(token), final=False)

    def flush(self) -> str:
        return self._release(self.decoder.flush(), final=True)

    def _release(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self.held + text
        self.held = ""
        hits = [text.index(stop) for stop in self.stop if stop in text]
        if hits:
            self.stopped = True
            return text[: min(hits)]
        if final:
            return text
        longest = max((len(stop) - 1 for stop in self.stop), default=0)
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-size:]) for stop in self.stop):
                self.held = text[-size:]
                return text[:-size]
        return text


class Clock:
    """Time to the first token, and from it to the last."""

    def __init__(self) -> None:
        mx.reset_peak_memory()
        self.start = self.first = self.last = time.perf_counter()
        self.tokens = 0

    def token(self) -> None:
        self.last = time.perf_counter()
        self.tokens += 1
        if self.tokens == 1:
            self.first = self.last

    def stats(self, prompt: int, reused: int, produced: int, seed: int, counts: SpeculationCounts) -> GenerationStats:
        to_first, after = self.first - self.start, self.last - self.first
        return GenerationStats(
            prompt_tokens=prompt,
            reused_tokens=reused,
            generation_tokens=produced,
            prompt_tokens_per_second=(prompt - reused) / to_first if to_first else 0.0,
            generation_tokens_per_second=(produced - 1) / after if after else 0.0,
            time_to_first_token_seconds=to_first,
            total_seconds=self.last - self.start,
            peak_memory_bytes=mx.get_peak_memory(),
            seed=seed,
            drafted_tokens=counts.drafted,
            accepted_tokens=counts.accepted,
            target_passes=counts.passes or max(produced - 1, 0),
        )
