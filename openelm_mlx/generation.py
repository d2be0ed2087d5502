"""The map: a prompt goes in, events come out. Chat, generate, benchmarks and servers all call `stream_generate`."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from openelm_mlx.cache import PromptCache
from openelm_mlx.decode import Progress, State, StepSpec, choose, decode, prefill
from openelm_mlx.errors import PromptError
from openelm_mlx.options import GenerationOptions, SamplingOptions, with_overrides
from openelm_mlx.sampling import History, new_seed, seed_key
from openelm_mlx.tokenizer import StreamingDecoder

if TYPE_CHECKING:
    from openelm_mlx.loading import Engine


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


@dataclass(frozen=True)
class Event:
    """One token and the text that became safe to print with it; the last event has `finish_reason` and `stats`."""

    text: str
    token: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None  # "stop": end of text or a stop string; "length": max_tokens or context is full
    stats: GenerationStats | None = None


def generate(
    engine: Engine,
    prompt: str | Sequence[int],
    sampling: SamplingOptions | None = None,
    options: GenerationOptions | None = None,
    **settings: Any,
) -> str:
    """The whole text that follows `prompt`; arguments and errors are those of `stream_generate`."""
    return "".join(event.text for event in stream_generate(engine, prompt, sampling, options, **settings))


def stream_generate(
    engine: Engine,
    prompt: str | Sequence[int],
    sampling: SamplingOptions | None = None,
    options: GenerationOptions | None = None,
    *,
    prompt_cache: PromptCache | None = None,
    progress: Progress | None = None,
    **overrides: Any,
) -> Generator[Event, None, None]:
    """Yield an `Event` a token. `overrides` are field names of either options class: `temperature=0.7`.

    `prompt_cache` is reused as far as its tokens agree with the prompt and holds prompt and answer afterwards.
    `progress(done, total)` is called after each prefilled chunk. Closing the iterator stops at once and leaves
    nothing in flight. Raises `PromptError` (empty, too long, ids out of range) and `OptionError` before any work.
    """
    sampling, options = with_overrides(sampling, options, overrides)
    tokens = prompt_tokens(engine, prompt)
    return _generate(engine, tokens, sampling, options, prompt_cache or PromptCache.for_config(engine.config), progress)


def _generate(
    engine: Engine,
    tokens: list[int],
    sampling: SamplingOptions,
    options: GenerationOptions,
    cache: PromptCache,
    progress: Progress | None,
) -> Generator[Event, None, None]:
    seed = new_seed() if sampling.seed is None else sampling.seed
    room = min(options.max_tokens, engine.config.max_context_length - len(tokens) + 1)
    spec = StepSpec(sampling, engine.vocab, options.logprobs, options.compiled)
    clock = Clock()
    # 1. keep what the cache already holds of this prompt
    reused = cache.reuse(tokens)
    # 2. the rest of the prompt, in chunks
    logits = prefill(engine.model, tokens[reused:], cache.layers, options.prefill_chunk, progress)
    cache.tokens[:] = tokens
    # 3. the first token, from the prompt's last logits
    state = choose(spec, logits, first_state(engine, spec, tokens, seed, cache))
    # 4. the loop, one token ahead of us
    text = TextFilter(StreamingDecoder(engine.tokenizer), options.stop)
    produced: list[int] = []
    try:
        with closing(decode(engine.steps.get(spec), state, cache.layers, room)) as states:
            for state in states:
                token = token_of(state)
                clock.token()
                produced.append(token)
                # 5. ids -> text, held back while it could still become a stop string
                ended = token == engine.config.eos_token_id and not options.ignore_eos
                shown = text.flush() if ended else text.push(token)
                stopped, last = ended or text.stopped, len(produced) == room
                if stopped or last:
                    break
                yield Event(shown, token, *logprob_fields(state))
    finally:
        # the step already under way has fed the last token too; the cache says how far it came
        cache.tokens.extend(produced[: cache.layers[0].offset - len(tokens)])
    # 6. the last event carries the reason and the statistics
    shown += "" if stopped else text.flush()
    reason = "stop" if stopped or text.stopped else "length"
    yield Event(shown, token, *logprob_fields(state), reason, clock.stats(len(tokens), reused, len(produced), seed))


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


def first_state(engine: Engine, spec: StepSpec, tokens: list[int], seed: int, cache: PromptCache) -> State:
    """The state before the first token is drawn: its position is that of the prompt's last token."""
    history = History.of_prompt([tokens], spec.vocab) if spec.sampling.penalised else None
    buffers = [layer.buffer for layer in cache.layers if layer.buffer is not None]
    last = mx.array([len(tokens) - 1], dtype=mx.int32)
    return State(mx.array([tokens[-1]], dtype=mx.uint32), last, seed_key(seed), history, None, buffers)


def token_of(state: State) -> int:
    values: Any = state.token.tolist()
    return int(values[0])


def logprob_fields(state: State) -> tuple[float | None, tuple[tuple[int, float], ...]]:
    if state.logprobs is None:
        return None, ()
    chosen, top_tokens, top = state.logprobs
    ids: Any = top_tokens[0].tolist()
    values: Any = top[0].tolist()
    first: Any = chosen.tolist()
    return first[0], tuple(zip(ids, values, strict=True))


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

    def stats(self, prompt: int, reused: int, produced: int, seed: int) -> GenerationStats:
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
        )
