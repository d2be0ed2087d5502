"""The answer of /v1/completions: texts, perhaps after their prompts, and their log probabilities.

Log probabilities of a prompt's tokens are those of the model itself, as of the tokens it draws.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from openelm_mlx.engine.prompts import decoder_after
from openelm_mlx.engine.request import Event, TokenLogprobs
from openelm_mlx.engine.tokenizer import StreamingDecoder, Tokenizer
from openelm_mlx.server.answers import Choice, ChoicesAnswer, least


@dataclass
class Listing:
    """Tokens, each with where it begins in the text and what it spells, as completions list them.

    `place` is the number of characters of the text so far, as `decoder` reads it.
    """

    tokenizer: Tokenizer
    decoder: StreamingDecoder
    place: int
    rows: list[tuple[str, float | None, dict[str, float] | None, int]] = field(default_factory=list)

    def add(self, token: int, found: TokenLogprobs | None) -> None:
        """Add a token; None stands for one that nothing comes before."""
        name, logprob, top = self.spelling(token), None, None
        if found is not None:
            logprob, top = least(found[0]), dict[str, float]()
            for other, value in found[1]:
                top.setdefault(self.spelling(other), least(value))
            top.setdefault(name, logprob)  # as OpenAI: that of the token itself in any case
        self.rows.append((name, logprob, top, self.place))
        self.place += len(self.decoder.push(token))

    def spelling(self, token: int) -> str:
        """Return what a token spells; parts of characters and control tokens have names.

        As of OpenAI's completions, so that different tokens have different names.
        """
        piece = self.tokenizer.piece_bytes(token)
        names = {self.tokenizer.bos_id: "<s>", self.tokenizer.eos_id: "</s>"}
        if not piece:
            return names.get(token, f"<token {token}>")
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)


def listed(rows: Sequence[Sequence[Any]]) -> dict[str, list[Any]]:
    """Return rows of a listing as completions have them."""
    names = ("tokens", "token_logprobs", "top_logprobs", "text_offset")
    return {name: [row[column] for row in rows] for column, name in enumerate(names)}


class CompletionAnswer(ChoicesAnswer):
    """The answer of /v1/completions."""

    kind, chunk_kind, prefix = "text_completion", "text_completion", "cmpl-"

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self._echoes: list[str] = []
        self._listings: list[Listing] = []

    def begin(self, scored: Sequence[Sequence[TokenLogprobs]]) -> None:
        """Take the prompts in, with the log probabilities of their tokens after the first.

        `scored` has those of each prompt, where they are echoed and reported.
        """
        asked, tokenizer = self.asked, self.engine.tokenizer
        for number, prompt in enumerate(asked.prompts):
            tokens = list(self.choices[number * asked.n].prompt)
            echo, listing = "", Listing(tokenizer, StreamingDecoder(tokenizer), 0)
            if asked.echo:
                echo = prompt if isinstance(prompt, str) else tokenizer.decode(tokens)
            if scored:
                for token, found in zip(tokens, [None, *scored[number]], strict=True):
                    listing.add(token, found)
            for _ in range(asked.n):
                self._echoes.append(echo)
                own = StreamingDecoder(tokenizer)
                if not asked.options.constrained:
                    own = decoder_after(tokenizer, tokens)
                self._listings.append(Listing(tokenizer, own, len(echo), list(listing.rows)))

    def take(self, index: int, event: Event) -> None:
        super().take(index, event)
        if event.logprob is not None:
            self._listings[index].add(event.token, (event.logprob, event.top_logprobs))

    def choice(self, index: int, choice: Choice) -> dict[str, Any]:
        wanted = self.asked.options.logprobs is not None
        return {
            "index": index,
            "text": self._echoes[index] + choice.text,
            "logprobs": listed(self._listings[index].rows) if wanted else None,
            "finish_reason": choice.finish_reason,
        }

    def opening(self) -> list[str]:
        """Echo the prompts; an answer of no token ends at once."""
        frames = []
        for index, choice in enumerate(self.choices):
            shown = self._echoes[index] or self._listings[index].rows
            if not shown and choice.finish_reason is None:
                continue
            said = self.choice(index, choice)
            frames.append(f"{self._head}{json.dumps(said)}{self._tail}")
        return frames

    def delta(self, index: int, event: Event) -> str:
        details = "null"
        if event.logprob is not None:
            details = json.dumps(listed(self._listings[index].rows[-1:]))
        return f'"text": {json.dumps(event.text)}, "logprobs": {details}'
