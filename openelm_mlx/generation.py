"""The map of the engine: a prompt goes in, events come out.

Chat, generate, benchmarks and servers all call `stream_generate`; `_generate` is the path of a
token, in six numbered steps.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence, Set
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import mlx.core as mx

from openelm_mlx.decode import Progress, State, StepSpec, choose, decode, prefill
from openelm_mlx.drafts import Chain, Draft, ModelDraft, PromptLookup
from openelm_mlx.errors import CacheError, OptionError, PromptError
from openelm_mlx.instruct import Message, answer_prefix, encode_messages
from openelm_mlx.kv import CacheKind
from openelm_mlx.options import GenerationOptions, SamplingOptions, check_loaded, explained, shown, with_overrides
from openelm_mlx.prompt_cache import PromptCache, common_prefix, continued_ids
from openelm_mlx.sampling import History, new_seed, seed_key
from openelm_mlx.speculative import SpeculationCounts, speculate
from openelm_mlx.stats import Clock, GenerationStats
from openelm_mlx.tokenizer import StreamingDecoder, as_id

if TYPE_CHECKING:
    from typing_extensions import Unpack  # only type checkers import it; nothing to install

    from openelm_mlx.loading import Engine
    from openelm_mlx.options import Settings

Prompt = str | Sequence[int] | Sequence[Message]  # text, token ids, or the messages of a conversation


@dataclass(frozen=True)
class Event:
    """One token, and the text that became safe to print with it.

    Only the last event has `finish_reason` and `stats`.
    """

    text: str
    token: int | None
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None  # "stop": end of text or a stop string; "length": max_tokens or context is full
    stats: GenerationStats | None = None


@explained(SamplingOptions, GenerationOptions)
def generate(
    engine: Engine,
    prompt: Prompt,
    sampling: SamplingOptions | None = None,
    options: GenerationOptions | None = None,
    *,
    prompt_cache: PromptCache | None = None,
    draft: Engine | Draft | None = None,
    progress: Progress | None = None,
    **settings: Unpack[Settings],
) -> str:
    """Return the text that follows `prompt`. Arguments and errors are those of `stream_generate`.

    >>> engine = load("openelm-tiny")
    >>> text = generate(engine, "Once upon a time", max_tokens=64, temperature=0.7, seed=1)

    `settings` are options by name; they replace those in `sampling` and `options`.
    """
    events = stream_generate(
        engine, prompt, sampling, options, prompt_cache=prompt_cache, draft=draft, progress=progress, **settings
    )
    return "".join(event.text for event in events)


@explained(SamplingOptions, GenerationOptions)
def stream_generate(
    engine: Engine,
    prompt: Prompt,
    sampling: SamplingOptions | None = None,
    options: GenerationOptions | None = None,
    *,
    prompt_cache: PromptCache | None = None,
    draft: Engine | Draft | None = None,
    progress: Progress | None = None,
    position_offset: int = 0,
    **settings: Unpack[Settings],
) -> Generator[Event, None, None]:
    """Yield one `Event` per token.

    >>> for event in stream_generate(engine, "Once upon a time", max_tokens=64):
    ...     print(event.text, end="", flush=True)

    `settings` are options by name; they replace those in `sampling` and `options`.

    A `prompt` is text, token ids or a list of messages `{"role": ..., "content": ...}`. The text of all events is what
    the tokens add to the prompt's text, its leading space included; only an answer in the Instruct format starts without.

    `prompt_cache` is reused as far as its tokens agree with the prompt and holds prompt and answer afterwards. A prompt
    of text goes on from the tokens it holds where their text is the beginning of the prompt's.
    `draft` (a smaller engine with the same tokenizer, or a `ModelDraft` of one, which keeps its cache between calls)
    and the option `prompt_lookup` speed up decoding without changing what is drawn. `progress(done, total)` is
    called after each prefilled chunk. `position_offset` is how many tokens of the text, at its beginning, are no longer
    in the prompt: random numbers are those of the whole text. Closing the iterator stops at once and leaves nothing in
    flight. Raises `PromptError` (empty, too long, no text nor ids), `OptionError` and `CacheError` before any work.
    """
    check_loaded("engine", engine)
    sampling, options = with_overrides(sampling, options, settings)
    if not isinstance(prompt_cache, PromptCache | None):
        raise OptionError(f"prompt_cache is {shown(prompt_cache)}; allowed is a PromptCache")
    if progress is not None and not callable(progress):
        raise OptionError(f"progress is {shown(progress)}; allowed is a function of two numbers, or None")
    if type(position_offset) is not int or position_offset < 0:
        raise OptionError(f"position_offset is {position_offset!r}; allowed is a whole number from 0 up")
    kind = CacheKind.of(engine.config, options)
    cache = PromptCache.for_config(engine.config, kind) if prompt_cache is None else prompt_cache
    if cache.kind != kind:
        raise CacheError(f"the prompt cache holds {cache.kind}, but the options ask for {kind}; make one for them")
    tokens = prompt_tokens(engine, prompt, cache.tokens)
    chain = draft_for(engine, draft, options)
    return _generate(engine, tokens, sampling, options, cache, chain, progress, position_offset)


def _generate(
    engine: Engine,
    tokens: list[int],
    sampling: SamplingOptions,
    options: GenerationOptions,
    cache: PromptCache,
    draft: Chain | None,
    progress: Progress | None,
    position_offset: int,
) -> Generator[Event, None, None]:
    seed = new_seed() if sampling.seed is None else sampling.seed
    room = min(options.max_tokens, engine.config.max_context_length - len(tokens) + 1)
    spec = StepSpec(sampling, engine.vocab, options.logprobs, options.compiled, cache.kind)
    clock, counts = Clock().start(), SpeculationCounts()
    # 1. keep what the cache already holds of this prompt
    reused = cache.reuse(tokens)
    text = TextFilter(decoder_after(engine, tokens), options.stop)
    produced: list[int] = []
    try:
        # 2. the rest of the prompt, in chunks
        logits = prefill(engine.model, tokens[reused:], cache.layers, options.prefill_chunk, progress)
        # 3. the first token, from the prompt's last logits
        state = choose(spec, logits, first_state(spec, tokens, seed_key(seed, sampling.stream, position_offset)))
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
                clock.reader.leave()
                yield Event(shown, token, logprob, top)
                clock.reader.back()
    finally:
        cache.hold(tokens + produced)
    # 6. the last event carries the reason and the statistics
    shown += "" if stopped else text.flush()
    reason = "stop" if stopped or text.stopped else "length"
    yield Event(shown, token, logprob, top, reason, clock.stats(len(tokens), reused, seed, counts))


def draft_for(engine: Engine, draft: Engine | Draft | None, options: GenerationOptions) -> Chain | None:
    """Return the drafts that `draft=` and the options ask for, or None. Raises `OptionError`.

    Prompt lookup comes first; a draft model is asked where lookup finds nothing.
    """
    options.check_draft(draft is not None)
    model: Any = draft if draft is None or hasattr(draft, "propose") else ModelDraft(engine, draft)
    lookup = PromptLookup(options.prompt_lookup) if options.prompt_lookup else None
    found: list[Draft] = [part for part in (lookup, model) if part is not None]
    return None if not found else Chain(found, options.draft_tokens, options.adaptive_draft)


def prompt_tokens(engine: Engine, prompt: Prompt, held: Sequence[int] = ()) -> list[int]:
    """Return the ids of a prompt: BOS and text, ids as given, or messages in the Instruct format.

    Text goes on from the ids `held` in a cache, where that reuses more of them than encoding the
    text anew. Raises `PromptError`.
    """
    limit = engine.config.max_context_length
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError("the prompt is empty; give at least one character")
        tokens = engine.tokenizer.encode(prompt)
        more = continued_ids(engine.tokenizer, held, prompt)
        gains = common_prefix(held, more) > common_prefix(held, tokens) and len(more) <= limit
        if gains and engine.tokenizer.decode(more) == engine.tokenizer.decode(tokens):
            tokens = more
    elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        tokens = encode_messages(engine.tokenizer, cast("Sequence[Message]", prompt))
    else:
        tokens = token_ids(prompt)
        if wrong := [token for token in tokens if not 0 <= token < engine.config.vocab_size]:
            raise PromptError(f"token id {wrong[0]} is outside the vocabulary of {engine.config.vocab_size}")
    if len(tokens) > limit:
        raise PromptError(f"the prompt has {len(tokens)} tokens; the model's context holds {limit}. Shorten the prompt")
    return tokens


def token_ids(given: Any) -> list[int]:
    """Return a list of ids from any iterable of integers, also a numpy or MLX array.

    Raises `PromptError`.
    """
    listed = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(given, (bytes, bytearray, memoryview, Mapping, Set)) or not isinstance(listed, Iterable):
        raise PromptError(
            f"the prompt is of type {type(given).__name__}; give text, a list of token ids or a list of messages"
        )
    ids = []
    for place, token in enumerate(listed, 1):
        try:
            ids.append(as_id(token))
        except TypeError:
            raise PromptError(
                f"number {place} of the prompt is of type {type(token).__name__}; a list is one of token ids, which are "
                "integers, or of messages. Give text as one string"
            ) from None
    if not ids:
        raise PromptError("the prompt is empty; give at least one token")
    return ids


def first_state(spec: StepSpec, prompt: list[int], key: mx.array) -> State:
    """Return the state before the first token is drawn, at the prompt's last position."""
    history = History.of_prompt([prompt], spec.vocab) if spec.sampling.penalised else None
    newest, last = mx.array(prompt[-1:], dtype=mx.uint32), mx.array([len(prompt) - 1], dtype=mx.int32)
    return State(newest, last, key, history, None, [])


def decoder_after(engine: Engine, prompt: list[int]) -> StreamingDecoder:
    """Return a decoder for the tokens that follow a prompt.

    An answer in the Instruct format is a text of its own; any other continues the prompt's text.
    """
    frame = answer_prefix(engine.tokenizer)
    if prompt[-len(frame) :] == frame:
        return StreamingDecoder(engine.tokenizer)
    return StreamingDecoder(engine.tokenizer, [token for token in prompt if token < engine.tokenizer.vocab_size])


class TextFilter:
    """Holds decoded text back while its end could still be the beginning of a stop string.

    stop "END":  "...the E" shows "...the ", "N" shows nothing, "joy" shows "ENjoy", "D" stops for good.

    Of several stop strings the match that begins first in the text wins, however the text is cut into tokens: a shorter
    match waits while a longer one that began before it may still come true.
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
        match = min((text.index(stop) for stop in self.stop if stop in text), default=len(text))
        longest = max((len(stop) - 1 for stop in self.stop), default=0)
        first = match if final else max(len(text) - longest, 0)
        undecided = [place for place in range(first, match) if any(stop.startswith(text[place:]) for stop in self.stop)]
        end = undecided[0] if undecided else match
        self.stopped = end == match < len(text)
        self.held = "" if self.stopped else text[end:]
        return text[:end]
