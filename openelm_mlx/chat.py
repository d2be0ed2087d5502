"""A conversation: messages in the Instruct format, and a cache that is fed only what is new.

Every exchange keeps the tokens that the model is fed of it: the question's, then the answer as it was generated, as far
as the user saw it. When the context is full the oldest exchanges go, the system turn stays, and a notice tells of it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from inspect import GEN_RUNNING, GEN_SUSPENDED, getgeneratorstate
from typing import TYPE_CHECKING, Any
from weakref import ref

from openelm_mlx.errors import PromptError
from openelm_mlx.instruct import answer_prefix, encode_messages, turn_tokens
from openelm_mlx.kv import CacheKind
from openelm_mlx.options import GenerationOptions, SamplingOptions, with_overrides
from openelm_mlx.prompt_cache import PromptCache
from openelm_mlx.tokenizer import Tokenizer

if TYPE_CHECKING:
    from openelm_mlx.decode import Progress
    from openelm_mlx.drafts import ModelDraft
    from openelm_mlx.generation import Event
    from openelm_mlx.loading import Engine

__all__ = ["Conversation", "encode_messages"]

Message = dict[str, str]
ANSWER_ROOM = 64  # tokens of context kept free for an answer, or a quarter of a small context
FORMAT = "openelm-mlx conversation 2"
READABLE = (None, "openelm-mlx conversation 1", FORMAT)  # files of the first format have no tokens


@dataclass(frozen=True)
class Exchange:
    """A question and its answer as the user saw them, and the tokens that the model is fed of both."""

    question: str
    answer: str
    tokens: tuple[int, ...]  # the user's turn, the assistant's, and EOS after each
    answer_tokens: int  # how many of them are the answer's, its EOS included
    attempt: int = 0  # answers to this question that were discarded before this one


@dataclass(frozen=True)
class Request:
    """An answer that is about to be given: what it follows, and what becomes of the conversation once it begins."""

    question: str
    prompt: list[int]
    kept: tuple[Exchange, ...]
    dropped_tokens: (
        int  # of all exchanges that the context had no room for, those of earlier requests included
    )
    attempt: int
    notices: list[str]


class Conversation:
    """Exchanges of user and assistant over one cache.

    `send(text)` yields events; `messages` grows by the question and the answer once the answer ends, also when it was
    stopped midway by closing the iterator. What an answer that never began would have changed stays as it was.
    `notices` holds what the user should be told since the last `send`. Without `sampling` the model's own defaults for
    chat hold (`engine.chat_sampling`), and `overrides` go on top. The seed is drawn once, here, where none is given.
    `options` and `sampling` may be replaced between two messages.
    """

    def __init__(
        self,
        engine: Engine,
        system: str | None = None,
        sampling: SamplingOptions | None = None,
        options: GenerationOptions | None = None,
        *,
        draft: Engine | ModelDraft | None = None,
        **overrides: Any,
    ) -> None:
        from openelm_mlx.drafts import ModelDraft

        self.engine = engine
        chosen, self.options = with_overrides(sampling or engine.chat_sampling, options, overrides)
        self._sampling = seeded(chosen)
        self.draft = (
            draft if draft is None or isinstance(draft, ModelDraft) else ModelDraft(engine, draft)
        )
        self.notices: list[str] = []
        self.system = system
        self._exchanges: tuple[Exchange, ...] = ()
        self._dropped_tokens = 0
        self._cache = PromptCache.for_config(
            engine.config, CacheKind.of(engine.config, self.options)
        )
        self._request: Request | None = (
            None  # the latest: an older one that has not begun may not begin any more
        )
        self._events: ref[Generator[Event, None, None]] | None = (
            None  # weak: an iterator that is let go closes itself
        )

    @property
    def system(self) -> str | None:
        """The system turn. A new one holds from the next message on, for the whole conversation so far."""
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        if text is not None and not isinstance(text, str):
            raise PromptError(f"the system turn is {text!r}; give a text, or None for an empty one")
        self._system = text

    @property
    def sampling(self) -> SamplingOptions:
        """How answers are drawn; its seed is never None: replaced by options without one, the seed stays."""
        return self._sampling

    @sampling.setter
    def sampling(self, sampling: SamplingOptions) -> None:
        self._sampling = seeded(sampling, self._sampling.seed)

    @property
    def messages(self) -> list[Message]:
        """The conversation that the model still sees, as texts; a list of its own, made anew."""
        return [
            {"role": role, "content": text}
            for exchange in self._exchanges
            for role, text in (("user", exchange.question), ("assistant", exchange.answer))
        ]

    @property
    def context_used(self) -> int:
        """Tokens of the context that the conversation takes; 0 before the first answer."""
        return len(self._head()) + size(self._exchanges) if self._exchanges else 0

    @property
    def context_length(self) -> int:
        """Tokens that the model's context holds."""
        return self.engine.config.max_context_length

    def send(self, text: str, progress: Progress | None = None) -> Generator[Event, None, None]:
        """Ask, and yield the answer as it comes.

        `progress(done, total)` is called after each prefilled chunk of the prompt. Raises `PromptError`, at once and
        without a change, for a message that cannot fit beside the system turn and while another answer is being given.
        """
        self._check_idle()
        if not isinstance(text, str):
            raise PromptError(f"the message is {text!r}; give a text")
        if not text.strip():
            raise PromptError("the message is empty; type something, or end the conversation")
        return self._begin(self._fit(text, self._exchanges), progress)

    def regenerate(self, progress: Progress | None = None) -> Generator[Event, None, None]:
        """Answer the last message once more, with other random numbers; the new answer takes the old one's place.

        Raises `PromptError` where nothing was answered yet, and as `send` does.
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
        """Drop the last exchange and return its question. Raises `PromptError` where there is none."""
        self._check_idle()
        if not self._exchanges:
            raise PromptError("there is nothing to undo; the conversation has no exchange yet")
        *kept, last = self._exchanges
        self._exchanges, self._request, self.notices = tuple(kept), None, []
        return last.question

    def stop(self) -> None:
        """End the answer that is being given, if one is; the conversation keeps what was shown of it."""
        events = self._events() if self._events else None
        if events is not None and self._answering():
            events.close()

    def reset(self) -> None:
        """Forget every exchange; the system turn stays."""
        self._check_idle()
        self._exchanges, self._dropped_tokens, self._request, self.notices = (), 0, None, []
        self._cache = PromptCache.for_config(self.engine.config, self._cache.kind)

    def _answering(self) -> bool:
        events = self._events() if self._events else None
        return events is not None and getgeneratorstate(events) in (GEN_SUSPENDED, GEN_RUNNING)

    def _check_idle(self) -> None:
        if self._answering():
            raise PromptError(
                "an answer is still being given; read it to its end, or end it with stop()"
            )

    def _begin(self, request: Request, progress: Progress | None) -> Generator[Event, None, None]:
        """The events of the answer; whatever can be wrong with the options is raised before anything changes."""
        from openelm_mlx.generation import stream_generate

        kind = CacheKind.of(self.engine.config, self.options)
        cache = (
            self._cache
            if self._cache.kind == kind
            else PromptCache.for_config(self.engine.config, kind)
        )
        events = stream_generate(
            self.engine, request.prompt, self._sampling_of(request), self.options,
            prompt_cache=cache, draft=self.draft, progress=progress,
        )  # fmt: skip
        answer = self._answer(request, events)
        self._cache, self._request, self._events, self.notices = (
            cache,
            request,
            ref(answer),
            request.notices,
        )
        return answer

    def _sampling_of(self, request: Request) -> SamplingOptions:
        return replace(self.sampling, seed=(self.sampling.seed or 0) + request.attempt)

    def _answer(
        self, request: Request, events: Generator[Event, None, None]
    ) -> Generator[Event, None, None]:
        if request is not self._request:
            raise PromptError(
                "the conversation went on before this answer began; send the message again"
            )
        shown, tokens = "", []
        try:
            with closing(events):
                for event in events:
                    shown += event.text
                    tokens.append(event.token)
                    yield event
        finally:
            if tokens:  # else the prefill failed or was interrupted: nothing was said
                said = [token for token in tokens if token is not None]
                exchange = self._exchange(request.question, shown, said, request.attempt)
                self._exchanges, self._dropped_tokens = (
                    (*request.kept, exchange),
                    request.dropped_tokens,
                )
            else:
                self.notices = []

    def _exchange(self, question: str, shown: str, said: Sequence[int], attempt: int) -> Exchange:
        """An exchange whose answer is fed as generated where that reads as it was shown, else encoded anew."""
        tokenizer, asked = self.engine.tokenizer, self._question(question)
        tokens = [*asked, *as_shown(tokenizer, shown, said), tokenizer.eos_id]
        return Exchange(question, shown, tuple(tokens), len(tokens) - len(asked), attempt)

    def _fit(self, text: str, exchanges: tuple[Exchange, ...], attempt: int = 0) -> Request:
        """The request for the next answer. Raises `PromptError` where the message does not fit at all.

        Once the context is full, exchanges are dropped until half of it is free: the rest has to be prefilled anew,
        because its positions change, and then many messages follow at their own cost. The last exchange goes only
        where it must.
        """
        head, asked, length = self._head(), self._question(text), self.context_length
        room_for_answer = min(ANSWER_ROOM, length // 4, self.options.max_tokens)
        room = length - room_for_answer
        if len(head) + len(asked) > room:
            parts = [("the message", len(asked)), ("the system turn", len(head))]
            (what, most), (other, rest) = sorted(parts, key=lambda part: -part[1])
            raise PromptError(
                f"{what} is too long: it takes {most} tokens and {other} {rest}; "
                f"together at most {room} of the context's {length} fit. Shorten it"
            )
        used = len(head) + size(exchanges) + len(asked)
        # the answer fills some of the half as well: as much as the shortest one did, for all one knows
        half = length // 2 - min([room_for_answer, *(one.answer_tokens for one in exchanges)])
        gone = 0
        while used > room or (
            0 < gone < len(exchanges) - 1 and used - len(exchanges[gone].tokens) >= half
        ):
            used -= len(exchanges[gone].tokens)
            gone += 1
        turns = "oldest turn was" if gone == 1 else f"{gone} oldest turns were"
        kept = exchanges[gone:]
        return Request(
            text, [*head, *(token for one in kept for token in one.tokens), *asked], kept,
            self._dropped_tokens + size(exchanges[:gone]), attempt,
            [f"the context is full: the {turns} dropped"] if gone else [],
        )  # fmt: skip

    def _head(self) -> list[int]:
        return turn_tokens(self.engine.tokenizer, "system", self.system or "", first=True)

    def _question(self, text: str) -> list[int]:
        return [
            *turn_tokens(self.engine.tokenizer, "user", text),
            *answer_prefix(self.engine.tokenizer),
        ]

    def to_json(self) -> dict[str, Any]:
        """What `from_json` needs to go on another day: the texts, and the tokens that the model is fed of them."""
        return {
            "format": FORMAT,
            "system": self.system,
            "messages": self.messages,
            "exchanges": [
                {"tokens": list(one.tokens), "attempt": one.attempt} for one in self._exchanges
            ],
            "dropped_tokens": self._dropped_tokens,
        }

    @classmethod
    def from_json(cls, engine: Engine, data: Any, **settings: Any) -> Conversation:
        """A saved conversation; `settings` are arguments of the class. Raises `PromptError` for anything else.

        Saved tokens that do not read as the saved texts, as those of another tokenizer, are made anew from the texts.
        """
        try:
            form, system, saved = data.get("format"), data["system"], data["messages"]
            messages = [(m["role"], m["content"]) for m in saved]
        except (AttributeError, KeyError, TypeError):
            raise PromptError(
                "this is no saved conversation: it needs the keys 'system' and 'messages'"
            ) from None
        if form not in READABLE:
            raise PromptError(
                f"this saved conversation has the format {form!r}; readable are those up to {FORMAT!r}"
            )
        roles, texts = [role for role, _ in messages], [text for _, text in messages]
        if roles != ["user", "assistant"] * (len(roles) // 2) or not all(
            isinstance(text, str) for text in texts
        ):
            raise PromptError(
                "a saved conversation must alternate texts of 'user' and 'assistant', ending with an answer"
            )
        talk = cls(engine, system, **settings)
        details = data.get("exchanges")
        if not isinstance(details, list) or len(details) != len(texts) // 2:
            details = [None] * (len(texts) // 2)
        talk._exchanges = tuple(map(talk._restored, texts[::2], texts[1::2], details))
        talk._dropped_tokens = natural(data.get("dropped_tokens"))
        return talk

    def _restored(self, question: str, answer: str, detail: Any) -> Exchange:
        """A saved exchange, with its own tokens where they are those of its texts."""
        detail = detail if isinstance(detail, dict) else {}
        tokens, asked, tokenizer = (
            detail.get("tokens"),
            self._question(question),
            self.engine.tokenizer,
        )
        said: list[int] = []
        if (
            isinstance(tokens, list)
            and tokens[: len(asked)] == asked
            and tokens[-1] == tokenizer.eos_id
        ):
            said = tokens[len(asked) : -1]
        known = all(type(token) is int and 0 <= token < self.engine.vocab for token in said)
        return self._exchange(
            question, answer, said if known else [], natural(detail.get("attempt"))
        )


def seeded(sampling: SamplingOptions, seed: int | None = None) -> SamplingOptions:
    """The same options with a seed: their own, else the one given, else a new one."""
    from openelm_mlx.sampling import new_seed

    if sampling.seed is not None:
        return sampling
    return replace(sampling, seed=new_seed() if seed is None else seed)


def size(exchanges: Sequence[Exchange]) -> int:
    """Tokens that the exchanges take."""
    return sum(len(exchange.tokens) for exchange in exchanges)


def natural(value: Any) -> int:
    """A count from a saved file, 0 where there is none."""
    return value if type(value) is int and value >= 0 else 0


def as_shown(tokenizer: Tokenizer, shown: str, said: Sequence[int]) -> list[int]:
    """Tokens that read as `shown`: those generated, as long as they do, and what is left of the text encoded.

    shown  "I am th"        (the stop string "e" was found, or the answer was stopped)
    said   "I", " am", " the", ...  -> "I", " am", and " th" encoded
    """
    visible = [
        token for token in said if tokenizer.piece_bytes(token)
    ]  # no EOS and no BOS inside a turn
    if tokenizer.decode(visible) == shown:
        return visible
    text, count = shown.encode(), len(visible)
    while not starts_with(
        text, start := b"".join(map(tokenizer.piece_bytes, visible[:count])).removeprefix(b" ")
    ):
        count -= 1
    return visible[:count] + continuation(tokenizer, text[len(start) :].decode())


def continuation(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokens of a text that goes on from another: without a dummy prefix."""
    return turn_tokens(tokenizer, "assistant", text)[len(answer_prefix(tokenizer)) : -1]


def starts_with(text: bytes, start: bytes) -> bool:
    """Whether UTF-8 `text` begins with `start` and goes on with a whole character."""
    return text.startswith(start) and not 0x80 <= (text[len(start) :] or b" ")[0] < 0xC0
