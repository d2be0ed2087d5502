"""The lines of a batch become requests of the scheduler, and its events the lines of the answers.

No server and no event loop take part: the rows are kept full from the lines that come next.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

from pydantic import Field, ValidationError

from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.options import GenerationOptions, SamplingOptions
from openelm_mlx.engine.scheduler import BatchEngine
from openelm_mlx.errors import OpenELMError
from openelm_mlx.evaluate.score import likeliest
from openelm_mlx.fields import shown
from openelm_mlx.server.answers import Answer, ChatAnswer
from openelm_mlx.server.asked import (
    Asked,
    asked_of_chat,
    asked_of_completion,
    asked_of_response,
    prepared,
    refused,
)
from openelm_mlx.server.batch_file import ID, LINE_BYTES, MARK, loosely, number_of
from openelm_mlx.server.bodies import ChatBody, CompletionBody
from openelm_mlx.server.completions import CompletionAnswer
from openelm_mlx.server.errors import ApiError, api_error, invalid_body
from openelm_mlx.server.other_bodies import ResponseBody
from openelm_mlx.server.responses import ResponseAnswer
from openelm_mlx.server.strict import Strict, parsed

AHEAD = 2  # requests for each row that are in the scheduler, so that no row waits for the next
# what is asked at each address: the body, what it means, and the answer
ROUTES: dict[str, tuple[type[Any], Callable[[Any], Asked], Callable[..., Answer]]] = {
    "/v1/chat/completions": (ChatBody, asked_of_chat, ChatAnswer),
    "/v1/completions": (CompletionBody, asked_of_completion, CompletionAnswer),
    "/v1/responses": (ResponseBody, asked_of_response, ResponseAnswer),
}

Request = tuple[list[int], SamplingOptions, GenerationOptions]


class BatchLine(Strict):
    """One line of a batch."""

    custom_id: str = Field(min_length=1)
    method: Literal["POST"]
    url: Literal["/v1/chat/completions", "/v1/completions", "/v1/responses"]
    body: dict[str, Any]


class Result(NamedTuple):
    """The line of an answer, and what it counts for."""

    text: str
    failed: bool
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of those
    new_tokens: int = 0


@dataclass(eq=False)
class Line:
    """One line on its way: its answer as far as it has come, or the error that ended it."""

    number: int
    mark: str = ID
    custom_id: str | None = None
    answer: Any = None  # an Answer; None if there is an error before it
    error: ApiError | None = None

    def result(self) -> Result:
        """Return the line of the answer."""
        if self.error is not None:
            return Result(self._text(self.error.status, self.error.envelope), True)
        prompt, cached, new = self.answer.counts()
        return Result(self._text(200, self.answer.whole()), False, prompt, cached, new)

    def _text(self, status: int, body: dict[str, Any]) -> str:
        asked = f"{self.mark}{self.number}"
        response = {"status_code": status, "request_id": asked, "body": body}
        line = {"id": f"{ID}{self.number}", "custom_id": self.custom_id}
        return json.dumps({**line, "response": response, "error": None})


class Batch:
    """Runs lines in a scheduler; `model` is the name that a body may give, `mark` the batch's."""

    def __init__(self, engine: Engine, model: str, scheduler: BatchEngine, mark: str = ID) -> None:
        self.engine, self.model, self.scheduler, self.mark = engine, model, scheduler, mark
        self.most = AHEAD * scheduler.slots
        self._running: dict[int, tuple[Line, int]] = {}  # by the scheduler's number

    def results(self, lines: Iterable[tuple[int, bytes, bool]]) -> Iterator[list[Result]]:
        """Yield what has ended after each step; `lines` are those of `Input.line`."""
        asked = self._asked(lines)
        while (ended := self._submit(asked)) is not None or self.scheduler.busy:
            ended = ended or []
            for number, event in self.scheduler.step():
                if number in self._running:
                    line, index = self._running[number]
                    line.answer.take(index, event)
                    if event.finish_reason is not None:
                        del self._running[number]
                        if line.answer.done:
                            ended.append(line)
            yield [line.result() for line in ended]

    def _submit(self, asked: Iterator[tuple[Line, int, Request | None]]) -> list[Line] | None:
        """Fill the scheduler; return the lines that ended without it, None if none is left."""
        ended: list[Line] = []
        for count in range(self.most - len(self._running)):
            line, index, request = next(asked, (None, 0, None))
            if line is None:
                return ended if count else None
            if request is None:
                ended.append(line)
            elif line.error is None:
                try:
                    self._running[self.scheduler.submit(*request)] = line, index
                except OpenELMError as error:
                    self._withdraw(line)
                    line.error = api_error(error)
                    ended.append(line)
        return ended

    def _withdraw(self, line: Line) -> None:
        """Drop the other answers to a line."""
        for number in [one for one, (of, _) in self._running.items() if of is line]:
            del self._running[number]
            self.scheduler.cancel(number)

    def _asked(
        self, lines: Iterable[tuple[int, bytes, bool]]
    ) -> Iterator[tuple[Line, int, Request | None]]:
        """Yield the requests of each line, with the index of the choice; None if there is none."""
        for number, raw, again in lines:
            line, requests = Line(number, self.mark), list[Request]()
            try:
                requests = self._requests(line, raw, again)
            except (ApiError, OpenELMError) as error:
                line.error = api_error(error)
            except ValidationError as error:
                line.error = invalid_body(error)
            if not requests:  # there is an error, or no token is asked for
                yield line, 0, None
            for index, request in enumerate(requests):
                yield line, index, request

    def _requests(self, line: Line, raw: bytes, again: bool) -> list[Request]:
        """Return what a line asks of the scheduler, and give it an answer to fill.

        Raises `ApiError`, `OpenELMError` and pydantic's `ValidationError`.
        """
        if len(raw) > LINE_BYTES:
            raise ApiError(413, f"the line has more than {LINE_BYTES} bytes; shorten it")
        found = loosely(raw)
        if isinstance(found, dict) and isinstance(found.get("custom_id"), str):
            line.custom_id = found["custom_id"]
        try:
            found = parsed(raw.removeprefix(MARK).strip())
        except (ValueError, RecursionError) as error:
            raise refused(f"the line is not JSON that can be read: {error}", None) from None
        if not isinstance(found, dict):
            raise refused("the line is not a JSON object; give one request a line", None)
        given = BatchLine.model_validate(found)
        if again:
            what = f"an earlier line has the custom_id {shown(given.custom_id)} too"
            raise refused(f"{what}; give each line its own", "custom_id")
        body_of, ask, kind = ROUTES[given.url]
        body = body_of.model_validate(given.body)
        if body.model not in (None, self.model):
            what = f"the model {shown(body.model)} is not the one that runs, which is {self.model}"
            remedy = "leave model out, or give this one with --model"
            raise ApiError(404, f"{what}; {remedy}", param="model", code="model_not_found")
        asked = ask(body)
        if asked.stream:
            raise refused("stream is true, but a batch answers as a whole; leave it out", "stream")
        prompts = prepared(self.engine, asked)
        if isinstance(body, ResponseBody):  # an answer there has what was asked
            kind = partial(kind, body=body)
        tokens, top = [one for one, _ in prompts], asked.options.logprobs or 0
        line.answer = kind(asked, self.model, self.engine, tokens)
        scored = tokens if asked.scores_prompts else ()
        line.answer.begin([likeliest(self.engine, one, top) for one in scored])
        seed = number_of(given.custom_id)
        return list(asked.requests(prompts, self.engine.chat_sampling, seed))
