"""Events become the objects and chunks that OpenAI's clients read.

https://platform.openai.com/docs/api-reference/chat and .../completions
"""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.request import Event, GenerationStats, TokenLogprobs
from openelm_mlx.server.asked import Asked
from openelm_mlx.server.errors import ApiError

LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have
DONE = "data: [DONE]\n\n"


@dataclass
class Choice:
    """One of the answers, as far as it has come."""

    prompt: Sequence[int]
    texts: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)  # kept where log probabilities are reported
    finish_reason: str | None = None
    stats: GenerationStats | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Answer(ABC):
    """The answer to one body: the frames of its stream as events come, and the whole of it.

    `prompts` are the ids of each. A frame is one or more server-sent events as text.
    """

    kind, prefix = "", ""

    def __init__(
        self, asked: Asked, model: str, engine: Engine, prompts: Iterable[Sequence[int]]
    ) -> None:
        self.asked, self.model, self.engine = asked, model, engine
        self.choices = [Choice(tokens) for tokens in prompts for _ in range(asked.n)]
        self._open = len(self.choices)
        self.id, self.created = f"{self.prefix}{uuid4().hex}", int(time.time())
        if asked.max_tokens == 0:
            self._open = 0
            for choice in self.choices:
                choice.finish_reason = "length"

    @property
    def done(self) -> bool:
        """True if every choice has ended."""
        return self._open == 0

    def begin(self, scored: Sequence[Sequence[TokenLogprobs]]) -> None:  # noqa: B027
        """Take the prompts in; only an answer that echoes them does anything.

        `scored` has the log probabilities of their tokens, where they are asked for.
        """

    def take(self, index: int, event: Event) -> None:
        """Add an event to a choice."""
        choice = self.choices[index]
        choice.texts.append(event.text)
        if event.logprob is not None:
            choice.events.append(event)
        if event.finish_reason is not None:
            choice.finish_reason, choice.stats = event.finish_reason, event.stats
            self._open -= 1

    def counts(self) -> tuple[int, int, int]:
        """Return the tokens of prompts, of those found in the cache, and of answers.

        A prompt with several answers counts once.
        """
        stats = [choice.stats for choice in self.choices if choice.stats is not None]
        firsts = self.choices[:: self.asked.n]
        cached = sum(one.stats.reused_tokens for one in firsts if one.stats is not None)
        new = sum(one.generation_tokens for one in stats)
        return sum(len(choice.prompt) for choice in firsts), cached, new

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """Return the answer as one object."""

    @abstractmethod
    def opening(self) -> list[str]:
        """Return the frames before the first event."""

    @abstractmethod
    def chunk(self, index: int, event: Event) -> str | None:
        """Return the frame of an event that was taken, None where it has nothing to show."""

    @abstractmethod
    def closing(self) -> list[str]:
        """Return the frames after the last event."""

    @abstractmethod
    def failure(self, error: ApiError) -> str:
        """Return the frame that ends a stream with an error."""

    def details(self, events: Sequence[Event]) -> list[dict[str, Any]]:
        """Return tokens with their log probabilities in the form of chat."""
        return [
            self.token(event.token, event.logprob)
            | {"top_logprobs": [self.token(*pair) for pair in event.top_logprobs]}
            for event in events
        ]

    def token(self, token: int, logprob: float | None) -> dict[str, Any]:
        """Return a token with its text, its bytes and its log probability."""
        piece = self.engine.tokenizer.piece_bytes(token)
        return {
            "token": piece.decode("utf-8", "replace"),
            "logprob": least(logprob),
            "bytes": list(piece),
        }


class ChoicesAnswer(Answer):
    """An answer of several choices, in the objects that chat and completions share."""

    chunk_kind = ""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        head = {"id": self.id, "object": self.chunk_kind, "created": self.created}
        self._head = f'data: {json.dumps({**head, "model": self.model})[:-1]}, "choices": ['
        usage = ', "usage": null' if self.asked.include_usage else ""
        self._tail = f"]{usage}}}\n\n"

    def whole(self) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "choices": [self.choice(index, one) for index, one in enumerate(self.choices)],
            "usage": self.usage(),
        }

    def usage(self) -> dict[str, Any]:
        """Return the numbers of tokens."""
        prompt, cached, new = self.counts()
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def chunk(self, index: int, event: Event) -> str | None:
        if not event.text and event.logprob is None and event.finish_reason is None:
            return None
        reason = "null" if event.finish_reason is None else f'"{event.finish_reason}"'
        delta = self.delta(index, event)
        return f'{self._head}{{"index": {index}, {delta}, "finish_reason": {reason}}}{self._tail}'

    def closing(self) -> list[str]:
        if not self.asked.include_usage:
            return [DONE]
        return [f'{self._head}], "usage": {json.dumps(self.usage())}}}\n\n', DONE]

    def failure(self, error: ApiError) -> str:
        return f"data: {error.text}\n\n"

    @abstractmethod
    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """Return a choice of the whole answer."""

    @abstractmethod
    def delta(self, index: int, event: Event) -> str:
        """Return the members of a chunk's choice that an event fills, as JSON."""


class ChatAnswer(ChoicesAnswer):
    """The answer of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        wanted = self.asked.options.logprobs is not None
        content = self.details(choice.events)
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": {"content": content, "refusal": None} if wanted else None,
            "finish_reason": choice.finish_reason,
        }

    def opening(self) -> list[str]:
        """Say the role of every choice first."""
        said = '"delta": {"role": "assistant", "content": ""}, "logprobs": null'
        return [
            f'{self._head}{{"index": {index}, {said}, "finish_reason": null}}{self._tail}'
            for index in range(len(self.choices))
        ]

    def delta(self, index: int, event: Event) -> str:
        text = f'{{"content": {json.dumps(event.text)}}}' if event.text else "{}"
        if event.logprob is None:
            return f'"delta": {text}, "logprobs": null'
        details = json.dumps({"content": self.details([event]), "refusal": None})
        return f'"delta": {text}, "logprobs": {details}'


def least(logprob: float | None) -> float:
    """Return a log probability that JSON can express."""
    return LEAST_LOGPROB if logprob is None else max(logprob, LEAST_LOGPROB)
