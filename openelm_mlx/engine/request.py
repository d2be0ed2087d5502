"""One request: what was asked for, how far it came, and the tokens drawn for it turned into
events.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from openelm_mlx.device import mx
from openelm_mlx.engine.decode import State, StepSpec, each
from openelm_mlx.engine.grammar import constraint
from openelm_mlx.engine.instruct import answer_prefix
from openelm_mlx.engine.options import GenerationOptions, SamplingOptions
from openelm_mlx.engine.sampling import Controls, Filters, History, Logprobs, new_seed, seed_key
from openelm_mlx.engine.stats import Clock, GenerationStats, Reader
from openelm_mlx.engine.tokenizer import StreamingDecoder

if TYPE_CHECKING:
    from openelm_mlx.engine.decode import Progress
    from openelm_mlx.engine.loading import Engine
    from openelm_mlx.engine.speculation import Proposal
    from openelm_mlx.model.cache_kinds import CacheKind


@dataclass(frozen=True)
class Event:
    """One token, and the text that became safe to print with it.

    Only the last event has `finish_reason` and `stats`. The reason is "stop" at the end of text, a
    stop string or token, and "length" where max_tokens, a full context or a form that became too
    complex cut the text. `top_logprobs` are pairs (token, log probability), the likeliest first.
    """

    text: str
    token: int
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: str | None = None
    stats: GenerationStats | None = None


@dataclass(eq=False)
class Request:
    """One sequence on the host's side, alone or in a batch."""

    number: int
    engine: Engine = field(repr=False)
    prompt: list[int]
    sampling: SamplingOptions
    options: GenerationOptions
    reader: Reader = field(repr=False)
    owner: str = ""
    position_offset: int = 0
    progress: Progress | None = None

    def __post_init__(self) -> None:
        """Raise `OptionError` for a form of the answer that the model cannot follow."""
        engine, options, sampling = self.engine, self.options, self.sampling
        self.constraint = constraint(engine, options)
        self.seed = new_seed() if sampling.seed is None else sampling.seed
        self.key = seed_key(self.seed, sampling.stream, self.position_offset)  # [1, 2]
        self.known = list(self.prompt)  # prompt and answer so far
        self.room = min(options.max_tokens, engine.config.max_context_length - len(self.prompt) + 1)
        whole = options.constrained  # a text in a given form does not continue the prompt's
        decoder = (
            StreamingDecoder(engine.tokenizer) if whole else decoder_after(engine, self.prompt)
        )
        self.text = TextFilter(decoder, options.stop)
        ends = () if options.ignore_eos else engine.config.eos_token_ids
        self.ends = frozenset((*ends, *options.stop_tokens))
        self.reused = 0  # tokens of the prompt that a cache held
        self.weights: object = None  # that the prompt was prefilled with
        self.clock = Clock(self.reader)
        self.done = False

    @property
    def texts(self) -> tuple[list[int], list[int]]:
        """The prompt, and the answer so far."""
        return self.prompt, self.known[len(self.prompt) :]

    @property
    def left(self) -> int:
        """Tokens that may still be drawn."""
        return self.room - self.clock.tokens

    def take(self, token: int, detail: TokenLogprobs | None) -> Event:
        """Return the event of the next token; the last one carries reason and statistics."""
        self.clock.token()
        self.known.append(token)
        if self.constraint is not None:
            self.constraint.accept(token)
        wanted = self.options.logprobs
        logprob, top = (None, ()) if wanted is None or detail is None else detail
        top = top[:wanted]
        ended = token in self.ends
        shown = self.text.flush() if ended else self.text.push(token)
        stopped = ended or self.text.stopped
        if not stopped and self.left > 0:
            return Event(shown, token, logprob, top)
        self.done = True
        shown += "" if stopped else self.text.flush()
        broken = self.constraint is not None and self.constraint.broken  # cut off in the middle
        reason = "length" if broken or not (stopped or self.text.stopped) else "stop"
        stats = self.clock.stats(len(self.prompt), self.reused, self.seed)
        return Event(shown, token, logprob, top, reason, stats)


# The log probability of a token, and those of the likeliest ones with their ids.
TokenLogprobs = tuple[float, tuple[tuple[int, float], ...]]


def on_host(detail: Logprobs | None, count: int) -> list[TokenLogprobs | None]:
    """Wait for the log probabilities of `count` tokens."""
    if detail is None:
        return [None] * count
    columns: Any = [part.tolist() for part in detail]
    return [
        (chosen, tuple(zip(ids, top, strict=True)))
        for chosen, ids, top in zip(*columns, strict=True)
    ]


def spec_for(
    requests: Sequence[Request], vocab: int, kind: CacheKind, compiled: bool, held: Filters
) -> StepSpec:
    """Return what a step must be traced for, to serve all of these requests; `held` filters
    stay.
    """
    wanted = [one.options.logprobs for one in requests if one.options.logprobs is not None]
    masked = any(one.constraint is not None for one in requests)
    filters = Filters.of([one.sampling for one in requests], masked).beside(held)
    return StepSpec(filters, vocab, max(wanted, default=None), compiled, kind)


def state_of(rows: Sequence[Request | None], spec: StepSpec) -> State:
    """Return the state of these rows as the host knows it; None is a row that nobody uses.

    Every token known has been drawn, and the newest has not been fed.
    """
    unused, filters, vocab = mx.zeros((1, 2), mx.uint32), spec.filters, spec.vocab
    known = [[0] if one is None else one.known for one in rows]
    samplings = [None if one is None else one.sampling for one in rows]
    texts = [([], []) if one is None else one.texts for one in rows]
    pairs = zip(texts, samplings, strict=True)
    histories = [History.of(*text, sampling, filters, vocab) for text, sampling in pairs]
    some = [history for history in histories if history is not None]
    return State(
        token=mx.array([tokens[-1] for tokens in known], dtype=mx.uint32),
        position=mx.array([len(tokens) - 1 for tokens in known], dtype=mx.int32),
        alive=mx.array([one is not None for one in rows], dtype=mx.int32),
        key=mx.concatenate([unused if one is None else one.key for one in rows]),
        controls=Controls.of(samplings, filters, vocab),
        history=each(lambda *parts: mx.concatenate(list(parts)), *some) if some else None,
        buffers=[],
    )


def mask_of(
    rows: Sequence[Request | None], spec: StepSpec, drafted: Proposal | None = None
) -> mx.array | None:
    """Return the tokens that the grammars of the rows allow next, and after each token of their
    drafts.

    [B * (k + 1), vocab / 32] uint32, a bit for each token; all of them in rows without a grammar.
    Drafts are shortened to what a grammar allows.
    """
    if not spec.filters.masked:
        return None
    import numpy as np

    drafts: Any = [[]] * len(rows) if drafted is None else drafted.tokens.tolist()
    lengths = [0] * len(rows) if drafted is None else drafted.lengths
    shape = (len(rows), len(drafts[0]) + 1, -(-spec.vocab // 32))
    masks = np.full(shape, 0xFFFFFFFF, dtype=np.uint32)
    for row, one in enumerate(rows):
        if one is not None and one.constraint is not None:
            found, lengths[row] = one.constraint.along(drafts[row][: lengths[row]])
            masks[row, : len(found)] = found
    return mx.array(masks.reshape(-1, shape[-1]))


def decoder_after(engine: Engine, prompt: list[int]) -> StreamingDecoder:
    """Return a decoder for the tokens that follow a prompt.

    An answer in the Instruct format is a text of its own; any other continues the prompt's text.
    """
    frame = answer_prefix(engine.tokenizer)
    if prompt[-len(frame) :] == frame:
        return StreamingDecoder(engine.tokenizer)
    pieces = engine.tokenizer.vocab_size
    return StreamingDecoder(engine.tokenizer, [token for token in prompt if token < pieces])


class TextFilter:
    """Holds decoded text back while its end could still be the beginning of a stop string.

    stop "END":  "...the E" shows "...the ", "N" shows nothing, "joy" shows "ENjoy", "D" stops for good.

    Of several stop strings the match that begins first in the text wins, however the text is cut
    into tokens: a shorter match waits while a longer one that began before it may still come true.
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
        undecided = [
            place
            for place in range(first, match)
            if any(stop.startswith(text[place:]) for stop in self.stop)
        ]
        end = undecided[0] if undecided else match
        self.stopped = end == match < len(text)
        self.held = "" if self.stopped else text[end:]
        return text[:end]
