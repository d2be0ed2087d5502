"""Events become the objects and chunks that OpenAI's clients read.

https://platform.openai.com/docs/api-reference/chat and .../completions
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.request import Event, GenerationStats
from openelm_mlx.server.asked import Asked

LEAST_LOGPROB = -9999.0  # stands for minus infinity, which JSON does not have


@dataclass
class Choice:
    """One of the answers, as far as it has come."""

    prompt: str = ""  # what an echo begins with
    texts: list[str] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)  # kept where log probabilities are reported
    finish_reason: str | None = None
    stats: GenerationStats | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)


class Answer:
    """The answer to one body: its chunks as events come, and the whole of it."""

    kind, chunk_kind, prefix = "", "", ""

    def __init__(self, asked: Asked, model: str, engine: Engine, choices: Sequence[Choice]) -> None:
        self.asked, self.model, self.engine = asked, model, engine
        self.choices = list(choices)
        self.id, self.created = f"{self.prefix}-{uuid4().hex}", int(time.time())
        head = {"id": self.id, "object": self.chunk_kind, "created": self.created, "model": model}
        self._head = json.dumps(head)[:-1]
        self._usage = ', "usage": null' if asked.include_usage else ""

    @property
    def done(self) -> bool:
        """True if every choice has ended."""
        return all(choice.finish_reason is not None for choice in self.choices)

    def take(self, index: int, event: Event) -> None:
        """Add an event to a choice."""
        choice = self.choices[index]
        choice.texts.append(event.text)
        if event.logprob is not None:
            choice.events.append(event)
        if event.finish_reason is not None:
            choice.finish_reason, choice.stats = event.finish_reason, event.stats

    def whole(self) -> dict[str, Any]:
        """Return the answer as one object."""
        return {
            "id": self.id,
            "object": self.kind,
            "created": self.created,
            "model": self.model,
            "choices": [self.choice(index, one) for index, one in enumerate(self.choices)],
            "usage": self.usage(),
        }

    def usage(self) -> dict[str, Any]:
        """Return the numbers of tokens; a prompt with several answers counts once."""
        stats = [choice.stats for choice in self.choices]
        of_prompts = [one for one in stats[:: self.asked.n] if one is not None]
        prompt = sum(one.prompt_tokens for one in of_prompts)
        new = sum(one.generation_tokens for one in stats if one is not None)
        cached = sum(one.reused_tokens for one in of_prompts)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": cached},
        }

    def opening(self) -> list[str]:
        """Return the chunks before the first event."""
        return []

    def chunk(self, index: int, event: Event) -> str | None:
        """Return the chunk of an event that was taken, None where it has nothing to show."""
        if not event.text and event.logprob is None and event.finish_reason is None:
            return None
        reason = "null" if event.finish_reason is None else f'"{event.finish_reason}"'
        return (
            f'{self._head}, "choices": [{{"index": {index}, {self.delta(index, event)}, '
            f'"finish_reason": {reason}}}]{self._usage}}}'
        )

    def closing(self) -> list[str]:
        """Return the chunks after the last event."""
        if not self.asked.include_usage:
            return []
        return [f'{self._head}, "choices": [], "usage": {json.dumps(self.usage())}}}']

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        """Return a choice of the whole answer."""
        raise NotImplementedError

    def delta(self, index: int, event: Event) -> str:
        """Return the members of a chunk's choice that an event fills, as JSON."""
        raise NotImplementedError


class ChatAnswer(Answer):
    """The answer of /v1/chat/completions."""

    kind, chunk_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        wanted = self.asked.options.logprobs is not None
        return {
            "index": index,
            "message": {"role": "assistant", "content": choice.text, "refusal": None},
            "logprobs": self.logprobs(choice.events) if wanted else None,
            "finish_reason": choice.finish_reason,
        }

    def opening(self) -> list[str]:
        """Say the role of every choice first."""
        said = '"delta": {"role": "assistant", "content": ""}, "logprobs": null'
        return [
            f'{self._head}, "choices": [{{"index": {index}, {said}, "finish_reason": null}}]'
            f"{self._usage}}}"
            for index in range(len(self.choices))
        ]

    def delta(self, index: int, event: Event) -> str:
        text = f'{{"content": {json.dumps(event.text)}}}' if event.text else "{}"
        details = "null" if event.logprob is None else json.dumps(self.logprobs([event]))
        return f'"delta": {text}, "logprobs": {details}'

    def logprobs(self, events: Sequence[Event]) -> dict[str, Any]:
        """Return the log probabilities of tokens in the form of chat."""
        content = [
            self.token(event.token, event.logprob)
            | {"top_logprobs": [self.token(*pair) for pair in event.top_logprobs]}
            for event in events
        ]
        return {"content": content, "refusal": None}

    def token(self, token: int, logprob: float | None) -> dict[str, Any]:
        """Return a token with its text, its bytes and its log probability."""
        piece = self.engine.tokenizer.piece_bytes(token)
        return {
            "token": piece.decode("utf-8", "replace"),
            "logprob": least(logprob),
            "bytes": list(piece),
        }


class CompletionAnswer(Answer):
    """The answer of /v1/completions."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl"

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        wanted = self.asked.options.logprobs is not None
        return {
            "index": index,
            "text": choice.prompt + choice.text,
            "logprobs": self.logprobs(choice.events, len(choice.prompt)) if wanted else None,
            "finish_reason": choice.finish_reason,
        }

    def opening(self) -> list[str]:
        """Echo the prompts."""
        return [
            f'{self._head}, "choices": [{{"index": {index}, "text": {json.dumps(choice.prompt)}, '
            f'"logprobs": null, "finish_reason": null}}]{self._usage}}}'
            for index, choice in enumerate(self.choices)
            if choice.prompt
        ]

    def delta(self, index: int, event: Event) -> str:
        details = "null"
        if event.logprob is not None:
            choice = self.choices[index]
            before = len(choice.prompt) + len(choice.text) - len(event.text)
            details = json.dumps(self.logprobs([event], before))
        return f'"text": {json.dumps(event.text)}, "logprobs": {details}'

    def logprobs(self, events: Sequence[Event], start: int) -> dict[str, Any]:
        """Return the log probabilities of tokens in the form of completions.

        `start` is the number of characters before the first event.
        """
        places = [start]
        for event in events:
            places.append(places[-1] + len(event.text))
        return {
            "tokens": [self.spelling(event.token) for event in events],
            "token_logprobs": [least(event.logprob) for event in events],
            "top_logprobs": [
                {self.spelling(token): least(value) for token, value in event.top_logprobs}
                for event in events
            ],
            "text_offset": places[:-1],
        }

    def spelling(self, token: int) -> str:
        """Return what a token spells alone; parts of characters as U+FFFD."""
        return self.engine.tokenizer.piece_bytes(token).decode("utf-8", "replace")


def least(logprob: float | None) -> float:
    """Return a log probability that JSON can express."""
    return LEAST_LOGPROB if logprob is None else max(logprob, LEAST_LOGPROB)
