"""A conversation: messages in the Instruct format, and a cache that is fed only what is new.

The tokens of a conversation are kept as they were fed and generated, so the next turn starts where the last ended.
When the context is full the oldest turns go and the system turn stays, with a notice.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import TYPE_CHECKING, Any

from openelm_mlx.errors import PromptError
from openelm_mlx.instruct import answer_prefix, encode_messages, turn_tokens
from openelm_mlx.kv import CacheKind
from openelm_mlx.options import GenerationOptions, SamplingOptions, with_overrides
from openelm_mlx.prompt_cache import PromptCache

if TYPE_CHECKING:
    from openelm_mlx.decode import Progress
    from openelm_mlx.drafts import ModelDraft
    from openelm_mlx.generation import Event
    from openelm_mlx.loading import Engine

__all__ = ["Conversation", "encode_messages"]

Message = dict[str, str]
ANSWER_ROOM = 64  # tokens of context kept free for an answer, or a quarter of a small context


class Conversation:
    """Turns of user and assistant over one cache.

    `send(text)` yields events; `messages` grows by the question and the answer, also when the answer was stopped
    midway by closing the iterator. `notices` holds what the user should be told since the last `send`.
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
        self.sampling, self.options = with_overrides(sampling, options, overrides)
        self.draft = draft if draft is None or isinstance(draft, ModelDraft) else ModelDraft(engine, draft)
        self.messages: list[Message] = []
        self.notices: list[str] = []
        self._system = system
        self._exchanges: list[list[int]] = []  # tokens of question and answer, as fed and generated
        self._cache = self._new_cache()

    @property
    def system(self) -> str | None:
        return self._system

    @system.setter
    def system(self, text: str | None) -> None:
        """A new system turn; it holds from the next message on, for the whole conversation so far."""
        self._system = text

    @property
    def context_used(self) -> int:
        """Tokens of the context that the conversation holds now."""
        return len(self._cache.tokens)

    @property
    def context_length(self) -> int:
        return self.engine.config.max_context_length

    def reset(self) -> None:
        """Forget every turn; the system turn stays."""
        self.messages.clear()
        self._exchanges.clear()
        self.notices.clear()
        self._cache = self._new_cache()

    def _new_cache(self) -> PromptCache:
        return PromptCache.for_config(self.engine.config, CacheKind.of(self.engine.config, self.options))

    def send(self, text: str, progress: Progress | None = None) -> Generator[Event, None, None]:
        """Ask, and yield the answer as it comes. Raises `PromptError` when even this message alone is too long.

        `progress(done, total)` is called after each prefilled chunk of the prompt.
        """
        if not text.strip():
            raise PromptError("the message is empty; type something, or end the conversation")
        self.notices.clear()
        return self._answer(self._fit(text), text, progress)

    def _answer(self, prompt: list[int], text: str, progress: Progress | None) -> Generator[Event, None, None]:
        from openelm_mlx.generation import stream_generate

        answer, tokens = "", []
        events = stream_generate(
            self.engine, prompt, self.sampling, self.options,
            prompt_cache=self._cache, draft=self.draft, progress=progress,
        )  # fmt: skip
        try:
            with closing(events):
                for event in events:
                    answer += event.text
                    tokens.append(event.token)
                    yield event
        finally:
            eos = self.engine.tokenizer.eos_id
            said = [token for token in tokens if token is not None and token != eos]
            self._exchanges.append([*self._question(text), *said, eos])
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def _fit(self, text: str) -> list[int]:
        """Prompt for the next answer; the oldest turns are dropped, two messages at a time, until it fits."""
        room = self.context_length - min(ANSWER_ROOM, self.context_length // 4)
        dropped = 0
        while True:
            prompt = self._encode(text)
            if len(prompt) <= room:
                break
            if not self.messages:
                raise PromptError(
                    f"the message needs {len(prompt)} tokens with its frame; {room} of {self.context_length} fit. "
                    "Shorten it"
                )
            del self.messages[:2], self._exchanges[:1]
            dropped += 1
        if dropped:
            turns = "turn was" if dropped == 1 else "turns were"
            self.notices.append(f"the context is full: the {dropped} oldest {turns} dropped")
        return prompt

    def _encode(self, text: str) -> list[int]:
        """The tokens of `encode_messages`, except that answers stay as generated: the cache holds exactly those."""
        head = turn_tokens(self.engine.tokenizer, "system", self._system or "", first=True)
        return [*head, *(token for exchange in self._exchanges for token in exchange), *self._question(text)]

    def _question(self, text: str) -> list[int]:
        return [*turn_tokens(self.engine.tokenizer, "user", text), *answer_prefix(self.engine.tokenizer)]

    def to_json(self) -> dict[str, Any]:
        """What `from_json` needs to go on another day."""
        return {"format": "openelm-mlx conversation 1", "system": self._system, "messages": list(self.messages)}

    @classmethod
    def from_json(cls, engine: Engine, data: Any, **settings: Any) -> Conversation:
        """A saved conversation. Raises `PromptError` for anything else."""
        try:
            system, messages = data["system"], [{"role": m["role"], "content": m["content"]} for m in data["messages"]]
        except (KeyError, TypeError):
            raise PromptError("this is no saved conversation: it needs the keys 'system' and 'messages'") from None
        texts = [m["content"] for m in messages] + ([] if system is None else [system])
        roles = [m["role"] for m in messages]
        if roles != ["user", "assistant"] * (len(roles) // 2) or not all(isinstance(t, str) for t in texts):
            raise PromptError("a saved conversation must alternate texts of 'user' and 'assistant', ending with an answer")
        conversation = cls(engine, system, **settings)
        conversation.messages = messages
        for question, answer in zip(texts[0 : len(messages) : 2], texts[1 : len(messages) : 2], strict=True):
            turn = turn_tokens(engine.tokenizer, "user", question)
            conversation._exchanges.append([*turn, *turn_tokens(engine.tokenizer, "assistant", answer)])
        return conversation
