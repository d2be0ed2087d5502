"""A conversation: messages in the Instruct format. The model is fed only what is new.

If the context is full, the oldest exchanges are dropped, never the system turn, and a notice says
so.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass, replace
from inspect import GEN_RUNNING, GEN_SUSPENDED, getgeneratorstate
from typing import TYPE_CHECKING, Any
from weakref import ref

from openelm_mlx.engine.draft_model import ModelDraft
from openelm_mlx.engine.generation import stream_generate
from openelm_mlx.engine.options import (
    KINDS,
    EngineOptions,
    GenerationOptions,
    SamplingOptions,
    check_loaded,
    with_overrides,
)
from openelm_mlx.engine.prompt_cache import PromptCache
from openelm_mlx.engine.prompts import (
    Exchange,
    encode_messages,
    messages_of,
    question_tokens,
    read_saved,
    saved,
    turn_tokens,
)
from openelm_mlx.engine.sampling import new_seed
from openelm_mlx.engine.tokenizer import check_text
from openelm_mlx.errors import PromptError
from openelm_mlx.fields import explained, shown
from openelm_mlx.model.cache_kinds import CacheKind

if TYPE_CHECKING:
    from typing import Unpack

    from openelm_mlx.engine.decode import Progress
    from openelm_mlx.engine.loading import Engine
    from openelm_mlx.engine.options import Settings
    from openelm_mlx.engine.request import Event
    from openelm_mlx.engine.speculation import Draft

__all__ = ["Conversation", "encode_messages"]

STREAMS = 2**31  # the number of streams under one seed: SamplingOptions.stream is below it
ANSWER_SPACE = 64  # tokens of context kept free for an answer, or a quarter of a small context


@dataclass(frozen=True)
class Request:
    """An answer to generate, and what the conversation becomes once the answer has begun."""

    question: str
    prompt: list[int]
    kept: tuple[Exchange, ...]
    dropped_tokens: int  # in all exchanges that were dropped so far
    attempt: int
    notices: list[str]


@explained(*KINDS)
class Conversation:
    """A conversation of user and assistant. The model is fed only what is new.

    >>> conversation = Conversation(engine, "Be brief.", temperature=0.7)
    >>> for event in conversation.send("Hello!"):
    ...     print(event.text, end="", flush=True)

    `send(text)` yields events. When the answer ends, also because the iterator was closed midway,
    the question and the shown part of the answer are added to `messages`. If the answer did not
    begin, nothing changes. `notices` are texts for the user about the latest message.

    `sampling` defaults to the model's own defaults for chat (`engine.chat_sampling`); `settings`
    are options by name and replace those in the option objects. Without a seed, one is drawn here.
    `sampling`, `options` and `engine_options` may be replaced between messages.

    The keys and values are kept in `prompt_cache`, which several conversations may share; by
    default each has its own, for its text so far. Raises `OptionError` for wrong options,
    `CacheError` for a cache that the model cannot have, and `PromptError` for a system turn that is
    not a text.
    """

    def __init__(
        self,
        engine: Engine,
        system: str | None = None,
        sampling: SamplingOptions | None = None,
        options: GenerationOptions | None = None,
        *,
        engine_options: EngineOptions | None = None,
        draft: Engine | ModelDraft | Draft | None = None,
        prompt_cache: PromptCache | None = None,
        **settings: Unpack[Settings],
    ) -> None:
        check_loaded("engine", engine)
        self.engine = engine
        given = (engine.chat_sampling if sampling is None else sampling, options, engine_options)
        self._options: GenerationOptions
        chosen, self._options, self.engine_options = with_overrides(KINDS, given, settings)
        self._sampling = seeded(chosen)
        if not (draft is None or isinstance(draft, ModelDraft) or hasattr(draft, "propose")):
            draft = ModelDraft(engine, draft)
        self.draft: ModelDraft | Draft | None = draft
        self.options.check_draft(self.draft is not None)
        self.notices: list[str] = []
        self.system = system
        self._exchanges: tuple[Exchange, ...] = ()
        self._dropped_tokens = 0
        self.prompt_cache = PromptCache(max_bytes=0) if prompt_cache is None else prompt_cache
        self._request: Request | None = None  # the latest one; no earlier one may still begin
        # a weak reference: an iterator that nobody else refers to closes itself
        self._events: ref[Generator[Event, None, None]] | None = None

    @property
    def system(self) -> str | None:
        """The system turn. A new one replaces the old one from the next message on."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text is not None and not isinstance(text, str):
            raise PromptError(f"the system turn is {shown(text)}; give a text, or None")
        check_text(text or "")
        self._system = text

    @property
    def sampling(self) -> SamplingOptions:
        """How answers are drawn, always with a seed: new options without one keep the old one."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: SamplingOptions) -> None:
        chosen, _, _ = with_overrides(KINDS, (sampling, None, None), {})
        self._sampling = seeded(chosen, self._sampling.seed)

    @property
    def options(self) -> GenerationOptions:
        """The options of answers, from the next message on: when they stop, what is drafted."""
        return self._options

    @options.setter
    def options(self, options: GenerationOptions) -> None:
        _, self._options, _ = with_overrides(KINDS, (None, options, None), {})

    @property
    def engine_options(self) -> EngineOptions:
        """How the engine runs, from the next message on. Setting it may raise `CacheError`."""
        return self._engine_options

    @engine_options.setter
    def engine_options(self, options: EngineOptions) -> None:
        _, _, chosen = with_overrides(KINDS, (None, None, options), {})
        CacheKind.of(self.engine.config, chosen)
        self._engine_options = chosen

    @property
    def messages(self) -> list[dict[str, str]]:
        """The messages that the model still sees: a new list of dictionaries."""
        return messages_of(self._exchanges)

    @property
    def context_used(self) -> int:
        """The number of tokens that the conversation takes; 0 before the first answer.

        It never exceeds the context: the end of an answer that filled it has not been fed.
        """
        if not self._exchanges:
            return 0
        taken = len(self._head()) + sum(len(one.tokens) for one in self._exchanges)
        return min(taken, self.context_length)

    @property
    def context_length(self) -> int:
        """The number of tokens that the model's context takes."""
        return self.engine.config.max_context_length

    def send(self, text: str, progress: Progress | None = None) -> Generator[Event, None, None]:
        """Send a message, and yield the events of its answer.

        `progress(done, total)` is called after each prefilled chunk of the prompt. Raises
        `PromptError` if the message is empty or too long to fit with the system turn, and while
        another answer is being generated; `OptionError` if `options` contradict each other. Both
        are raised at once, and nothing changes.
        """
        self._check_idle()
        if not isinstance(text, str):
            raise PromptError(f"the message is {shown(text)}; give a text")
        if not text.strip():
            raise PromptError("the message is empty; give at least one word")
        return self._begin(self._fit(text, self._exchanges), progress)

    def regenerate(self, progress: Progress | None = None) -> Generator[Event, None, None]:
        """Answer the last message anew, with other random numbers, in place of its answer.

        Raises `PromptError` if nothing has been answered yet, and as `send` does.
        """
        self._check_idle()
        if not self._exchanges:
            raise PromptError("there is no answer to replace; send a message first")
        *kept, last = self._exchanges
        request = self._fit(last.question, tuple(kept), last.attempt + 1)
        if self.sampling.greedy:
            request.notices.append("greedy answers are always the same; a temperature gives others")
        return self._begin(request, progress)

    def undo(self) -> str:
        """Drop the last exchange and return its question.

        Raises `PromptError` if there is none, and while an answer is being generated.
        """
        self._check_idle()
        if not self._exchanges:
            raise PromptError("there is nothing to undo; the conversation has no exchange yet")
        *kept, last = self._exchanges
        self._exchanges, self._request, self.notices = tuple(kept), None, []
        return last.question

    def stop(self) -> None:
        """End the answer that is being generated, if any; what was shown of it is kept."""
        if (events := self._answering()) is not None:
            events.close()

    def reset(self) -> None:
        """Forget every exchange; the system turn stays. Raises `PromptError` during an answer."""
        self._check_idle()
        self._exchanges, self._dropped_tokens, self._request, self.notices = (), 0, None, []

    def _answering(self) -> Generator[Event, None, None] | None:
        """Return the iterator of an answer that has begun and not ended."""
        events = self._events() if self._events else None
        begun = events is not None and getgeneratorstate(events) in (GEN_SUSPENDED, GEN_RUNNING)
        return events if begun else None

    def _check_idle(self) -> None:
        if self._answering() is not None:
            remedy = "read it to the end, or end it with stop()"
            raise PromptError(f"an answer is still being generated; {remedy}")

    def _begin(self, request: Request, progress: Progress | None) -> Generator[Event, None, None]:
        """Yield the events of the answer. Wrong options raise here, before anything changes."""
        # each attempt has its own stream, and so its own noise
        stream = (self.sampling.stream + request.attempt) % STREAMS
        events = stream_generate(
            self.engine,
            request.prompt,
            replace(self.sampling, stream=stream),
            self.options,
            engine_options=self.engine_options,
            prompt_cache=self.prompt_cache,
            draft=self.draft,
            progress=progress,
            position_offset=request.dropped_tokens,
        )
        answer = self._answer(request, events)
        self._request, self._events = request, ref(answer)
        self.notices = request.notices
        return answer

    def _answer(
        self, request: Request, events: Generator[Event, None, None]
    ) -> Generator[Event, None, None]:
        """Yield the events, and add the exchange however they end."""
        if request is not self._request:
            what = "the conversation went on before this answer began"
            raise PromptError(f"{what}; send the message again")
        shown, tokens = "", []
        try:
            with closing(events):
                for event in events:
                    shown += event.text
                    tokens.append(event.token)
                    yield event
        finally:
            if tokens:  # else the prefill failed or was interrupted, and there is no answer
                asked, pieces = request.question, self.engine.tokenizer
                exchange = Exchange.of(pieces, asked, shown, tokens, request.attempt)
                self._exchanges = (*request.kept, exchange)
                self._dropped_tokens = request.dropped_tokens
            else:
                self.notices = []

    def _fit(self, text: str, exchanges: tuple[Exchange, ...], attempt: int = 0) -> Request:
        """Return the request for an answer. Raises `PromptError` if the message alone does not fit.

        When the context is full, exchanges are dropped until about half of it is free. Those that
        stay get other positions and must be prefilled again, but the next messages then cost only
        their own tokens. The last exchange is dropped only if it does not fit.
        """
        head, length = self._head(), self.context_length
        asked = question_tokens(self.engine.tokenizer, text)
        answer_space = min(ANSWER_SPACE, length // 4, self.options.max_tokens)
        space = length - answer_space
        if len(head) + len(asked) > space:
            parts = [("the message", len(asked)), ("the system turn", len(head))]
            (what, most), (other, rest) = sorted(parts, key=lambda part: -part[1])
            raise PromptError(
                f"{what} is too long: it takes {most} tokens and {other} {rest}; "
                f"together at most {space} of the context's {length} fit. Shorten it"
            )
        sizes = [len(one.tokens) for one in exchanges]
        used = len(head) + sum(sizes) + len(asked)
        # the answer fills some of the half; it is expected to be as long as the shortest one so far
        half = length // 2 - min([answer_space, *(one.answer_tokens for one in exchanges)])
        gone = 0
        while used > space or (0 < gone < len(sizes) - 1 and used - sizes[gone] >= half):
            used -= sizes[gone]
            gone += 1
        turns = "oldest turn was" if gone == 1 else f"{gone} oldest turns were"
        notices = [f"the context is full: the {turns} dropped"] if gone else []
        kept, dropped = exchanges[gone:], self._dropped_tokens + sum(sizes[:gone])
        prompt = [*head, *(token for one in kept for token in one.tokens), *asked]
        return Request(text, prompt, kept, dropped, attempt, notices)

    def _head(self) -> list[int]:
        """Return the ids of the system turn."""
        return turn_tokens(self.engine.tokenizer, "system", self.system or "", first=True)

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` needs: the texts, and the tokens that the model is fed."""
        return saved(self.system, self._exchanges, self._dropped_tokens)

    @classmethod
    def from_json(cls, engine: Engine, data: Any, **settings: Any) -> Conversation:
        """Restore a saved conversation, also one of another tokenizer.

        `settings` are arguments of the class. Raises `PromptError` for data of another kind.
        """
        check_loaded("engine", engine)
        system, exchanges, dropped = read_saved(engine.tokenizer, engine.vocab, data)
        talk = cls(engine, **{"system": system, **settings})
        talk._exchanges, talk._dropped_tokens = exchanges, dropped
        return talk


def seeded(sampling: SamplingOptions, seed: int | None = None) -> SamplingOptions:
    """Return the options with a seed: their own, else the one given, else a new one."""
    new = new_seed() if seed is None else seed
    return replace(sampling, seed=new) if sampling.seed is None else sampling
