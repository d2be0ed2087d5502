"""The answer of /v1/responses: one message of one text, and the typed events of its stream.

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import json
import time
from typing import Any
from uuid import uuid4

from openelm_mlx.engine.request import Event
from openelm_mlx.server.answers import Answer, Choice
from openelm_mlx.server.errors import ApiError
from openelm_mlx.server.other_bodies import ResponseBody

STATUS = {None: "in_progress", "stop": "completed", "length": "incomplete"}
TEXT = {"type": "text"}


class ResponseAnswer(Answer):
    """The answer of /v1/responses."""

    kind, prefix = "response", "resp_"

    def __init__(self, *given: Any, body: ResponseBody) -> None:
        super().__init__(*given)
        self._body, self._number, self._item = body, 0, f"msg_{uuid4().hex}"
        self._place = {"item_id": self._item, "output_index": 0, "content_index": 0}
        self._kept = json.dumps(self._place)[1:-1]

    @property
    def _choice(self) -> Choice:
        return self.choices[0]

    def whole(self) -> dict[str, Any]:
        """Return the response as one object, also while it is in progress."""
        reason = self._choice.finish_reason
        cut = {"reason": "max_output_tokens"} if reason == "length" else None
        return {**self.response(STATUS[reason]), "incomplete_details": cut}

    def response(self, status: str, error: ApiError | None = None) -> dict[str, Any]:
        """Return the response with what was asked, and what has come of it."""
        body, ended = self._body, status in ("completed", "incomplete")
        sampling = self.asked.sampling_for(self.engine.chat_sampling)
        asked_text = body.model_dump(include={"text"}, by_alias=True, exclude_none=True)
        failed = {"code": "server_error", "message": error.message} if error else None
        return {
            "id": self.id,
            "object": self.kind,
            "created_at": self.created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": failed,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self.model,
            "output": [self.item()] if ended else [],
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "service_tier": "default",
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": TEXT, **asked_text.get("text", {})},
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": body.top_logprobs or 0,
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": self.usage() if ended else None,
            "user": body.user,
        }

    def usage(self) -> dict[str, Any]:
        """Return the numbers of tokens."""
        prompt, cached, new = self.counts()
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": new,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": prompt + new,
        }

    def item(self, begun: bool = True) -> dict[str, Any]:
        """Return the message; `begun` says that it has its text."""
        return {
            "id": self._item,
            "type": "message",
            "status": STATUS[self._choice.finish_reason],
            "role": "assistant",
            "content": [self.part()] if begun else [],
        }

    def part(self) -> dict[str, Any]:
        """Return the text with its log probabilities."""
        choice = self._choice
        details = self.details(choice.events)
        return {"type": "output_text", "text": choice.text, "annotations": [], "logprobs": details}

    def opening(self) -> list[str]:
        """Say that the response, its message and its text begin."""
        return [
            self.frame("response.created", response=self.whole()),
            self.frame("response.in_progress", response=self.whole()),
            self.frame("response.output_item.added", output_index=0, item=self.item(begun=False)),
            self.frame("response.content_part.added", **self._place, part=self.part()),
        ]

    def chunk(self, index: int, event: Event) -> str | None:
        """Return the frame of an event that was taken, None where it has nothing to show."""
        if not event.text and event.logprob is None:
            return None
        details = json.dumps([] if event.logprob is None else self.details([event]))
        number, self._number = self._number, self._number + 1
        return (
            "event: response.output_text.delta\n"
            f'data: {{"type": "response.output_text.delta", "sequence_number": {number}, '
            f'{self._kept}, "delta": {json.dumps(event.text)}, "logprobs": {details}}}\n\n'
        )

    def closing(self) -> list[str]:
        """Say that the text, its message and the response are complete."""
        part, whole = self.part(), self.whole()
        said = {"text": part["text"], "logprobs": part["logprobs"]}
        return [
            self.frame("response.output_text.done", **self._place, **said),
            self.frame("response.content_part.done", **self._place, part=part),
            self.frame("response.output_item.done", output_index=0, item=self.item()),
            self.frame(f"response.{whole['status']}", response=whole),
        ]

    def failure(self, error: ApiError) -> str:
        """Return the events that end a stream with an error."""
        told = {"code": error.code, "message": error.message, "param": error.param}
        failed = self.response("failed", error)
        return self.frame("error", **told) + self.frame("response.failed", response=failed)

    def frame(self, kind: str, **members: Any) -> str:
        """Return the next event of the stream."""
        event = {"type": kind, "sequence_number": self._number, **members}
        self._number += 1
        return f"event: {kind}\ndata: {json.dumps(event)}\n\n"
