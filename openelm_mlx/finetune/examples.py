"""Examples: checked records become token ids, and marks on those that the loss counts.

    messages   BOS <|system|> EOS  <|user|> Why? EOS  <|assistant|> Because. EOS
    trained                                                         ^^^^^^^^^^^^
    text       BOS Once upon a time ... EOS
    trained        ^^^^^^^^^^^^^^^^^^^^^^^^

A conversation has the tokens of `engine.prompts.encode_messages`. A prompt with its completion is
an exchange of a conversation for an Instruct model; for others the completion goes on from the
prompt's tokens, as it would be generated, and ends with EOS. BOS and EOS never come from a text.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.prompts import Message, answer_prefix, turn_tokens
from openelm_mlx.errors import FinetuneError, OptionError
from openelm_mlx.finetune.options import FinetuneOptions
from openelm_mlx.finetune.records import Completion, Preference, Record

ROW = 1024  # tokens of a row, unless asked otherwise
PART = 1 << 20  # characters of a long text that are encoded at once, and the rest of their line
LAST_WINDOW = 32  # the fewest tokens of a long text's last window, for EOS to follow something

Turn = tuple[list[int], bytes]  # ids, and a mark for each


class Example(NamedTuple):
    """One sequence: ids, BOS included, and for each whether its prediction is trained."""

    tokens: array[int]  # of type "i": 4 bytes each
    trained: array[int]  # of type "b": 0 or 1 for each; the first is 0, as BOS is never predicted
    where: str  # names it in errors: "pairs.jsonl, line 3"


class Pair(NamedTuple):
    """Two answers to one prompt, of which the first is preferred."""

    chosen: Example
    rejected: Example


def sequences_of(example: Example | Pair) -> tuple[Example, ...]:
    """Return what is packed together: an example, or the two answers of a pair."""
    return tuple(example) if isinstance(example, Pair) else (example,)


class Overlong(FinetuneError):
    """An example does not fit into a row, and may not or cannot be split."""


def row_length(engine: Engine, options: FinetuneOptions) -> int:
    """Return the tokens of a row. Raises `OptionError` if they are more than the context."""
    context = engine.config.max_context_length
    length = min(ROW, context) if options.length is None else options.length
    if length > context:
        what = f"length is {length}, but {engine.name} has a context of {context} tokens"
        raise OptionError(f"{what}; allowed is a whole number up to that")
    return length


class Encoder:
    """Makes examples for one model, none longer than a row."""

    def __init__(self, engine: Engine, options: FinetuneOptions) -> None:
        self.length = row_length(engine, options)
        self.train_on, self.overlong = options.train_on, options.overlong
        self.tokenizer, self.instruct = engine.tokenizer, engine.instruct
        self._frame = answer_prefix(self.tokenizer)
        self._no_system = turn_tokens(self.tokenizer, "system", "", first=True)

    def __call__(self, record: Record, where: str) -> Sequence[Example | Pair]:
        """Return the examples of a record: one, or its parts if it is split.

        Raises `Overlong` for what is not split, `FinetuneError` if no token would be trained, and
        `PromptError` for a text that is not valid UTF-8.
        """
        if isinstance(record, Preference):
            sides = [self._sequence(side, where, "last", False) for side in record]
            return [Pair(sides[0][0], sides[1][0])]
        if isinstance(record, str):
            return self._text(record, where)
        train_on = self.train_on or "answers"
        return self._sequence(record, where, train_on, self.overlong == "split")

    def _sequence(
        self, record: Sequence[Message] | Completion, where: str, train_on: str, split: bool
    ) -> list[Example]:
        if isinstance(record, Completion):
            if not self.instruct:
                return [self._completion(record, where, train_on)]
            texts = zip(("user", "assistant"), record, strict=True)
            record = [{"role": role, "content": text} for role, text in texts]
        return self._conversation(record, where, train_on, split)

    def _text(self, text: str, where: str) -> list[Example]:
        """Return a text in windows of a row, each after BOS; every token is in one of them."""
        ids = array("i")
        for start, end in bounds(text):
            ids.extend(self.tokenizer.encode(text[start:end], bos=False, continued=start > 0))
        ids.append(self.tokenizer.eos_id)
        if self.overlong not in (None, "split"):
            self._check_length(1 + len(ids))
        return [
            example([self.tokenizer.bos_id, *part], marks(1 + len(part), 1), where)
            for part in windows(ids, self.length - 1)
        ]

    def _completion(self, record: Completion, where: str, train_on: str) -> Example:
        prompt = self.tokenizer.encode(record.prompt)
        answer = self.tokenizer.encode(record.completion, bos=False, continued=True)
        ids = [*prompt, *answer, self.tokenizer.eos_id]
        self._check_length(len(ids))
        first = 1 if train_on == "all" else len(prompt)
        return example(ids, marks(len(ids), first), where)

    def _conversation(
        self, messages: Sequence[Message], where: str, train_on: str, split: bool
    ) -> list[Example]:
        """Return a conversation, in parts of whole exchanges if it is split.

        Each part begins with the system's turn, which is trained in the first one at most.
        """
        system, exchanges = self._exchanges(messages, train_on)
        parts = [exchanges]
        if split:
            parts = fitting(exchanges, self.length - len(system[0]))
        examples = []
        for number, part in enumerate(parts):
            if number == 1:
                system = system[0], bytes(len(system[0]))
            turns = [system, *(turn for exchange in part for turn in exchange)]
            ids = [token for own, _ in turns for token in own]
            self._check_length(len(ids), "in an exchange " if split else "")
            if any(trained := b"".join(own for _, own in turns)):
                examples.append(example(ids, trained, where))
        if not examples:
            raise FinetuneError("has no answer, so nothing of it is trained")
        return examples

    def _exchanges(
        self, messages: Sequence[Message], train_on: str
    ) -> tuple[Turn, list[list[Turn]]]:
        """Return the system's turn, and the others: each user's turn with its answer."""
        everything, own = train_on == "all", messages[0]["role"] == "system"
        ids = self._no_system
        if own:
            ids = turn_tokens(self.tokenizer, "system", messages[0]["content"], first=True)
        system = ids, marks(len(ids), 1 if everything else len(ids))
        exchanges: list[list[Turn]] = []
        last = max((i for i, one in enumerate(messages) if one["role"] == "assistant"), default=0)
        for number, message in enumerate(messages[own:], int(own)):
            ids, answer = self._turn(message), message["role"] == "assistant"
            first = 0 if everything else len(ids)
            if answer and (train_on == "answers" or (train_on == "last" and number == last)):
                first = shared(self._frame, ids)
            if not answer:
                exchanges.append([])
            exchanges[-1].append((ids, marks(len(ids), first)))
        return system, exchanges

    def _turn(self, message: Message) -> list[int]:
        return turn_tokens(self.tokenizer, message["role"], message["content"])

    def _check_length(self, count: int, what: str = "") -> None:
        if count > self.length:
            raise Overlong(f"has {count:,} tokens {what}".rstrip())


def example(ids: list[int], trained: bytes, where: str) -> Example:
    return Example(array("i", ids), array("b", trained), where)


def marks(count: int, first: int) -> bytes:
    """Return marks of so many tokens, of which those from `first` on are trained."""
    return bytes(first) + b"\1" * (count - first)


def shared(some: Sequence[int], others: Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    pairs = enumerate(zip(some, others, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(some), len(others)))


def bounds(text: str) -> list[tuple[int, int]]:
    """Return where parts of a long text begin and end, each but the last after a line break.

    SentencePiece takes 40 times the bytes of a text while it encodes it. No piece of LLaMA's goes
    on after a line break, so the parts have the tokens of the whole.
    """
    ends = [0]
    while ends[-1] < len(text):
        ends.append(text.find("\n", ends[-1] + PART) + 1 or len(text))
    return list(pairwise(ends))


def windows(ids: Sequence[int], most: int) -> list[Sequence[int]]:
    """Return ids in parts of `most`; the last is shorter, but takes `LAST_WINDOW` if it can.

    >>> windows([1, 2, 3, 4, 5, 6, 7], 3)
    [[1, 2, 3], [4, 5], [6, 7]]
    """
    least = min(LAST_WINDOW, -(-most // 2))
    starts = [*range(0, len(ids), most)]
    if len(starts) > 1:
        starts[-1] = min(starts[-1], len(ids) - least)
    return [ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)], strict=True)]


def fitting(exchanges: list[list[Turn]], room: int) -> list[list[list[Turn]]]:
    """Return exchanges in parts of at most `room` tokens, each as long as can be from the end on.

    An exchange that is longer is a part of its own.
    """
    parts: list[list[list[Turn]]] = [[]]
    left = room
    for exchange in reversed(exchanges):
        size = sum(len(ids) for ids, _ in exchange)
        if size > left and parts[0]:
            parts.insert(0, [])
            left = room
        parts[0].insert(0, exchange)
        left -= size
    return parts
