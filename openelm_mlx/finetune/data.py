"""Data: all records of a source, each checked before the first is trained, as examples.

A source has records of one kind. All that is wrong with them is said at once, by line. What is
left out, because the options or the data ask for it, is said in `Data.notices`.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any, NamedTuple

from openelm_mlx.engine.loading import Engine
from openelm_mlx.errors import FinetuneError, OptionError, PromptError
from openelm_mlx.fields import check_unset, shown
from openelm_mlx.finetune.examples import Encoder, Example, Overlong, Pair, sequences_of
from openelm_mlx.finetune.options import FinetuneOptions
from openelm_mlx.finetune.records import (
    KEYS,
    MESSAGES,
    PAIRS,
    TEXT,
    Preference,
    checked,
    equal_answers,
    kind_of,
)
from openelm_mlx.finetune.sources import raw_records

NAMED, QUOTED = 10, 300  # of many records, so many are named, each in so many characters
MAX_TOKENS = 1 << 29  # ids and marks of more take above 2.7 GB

Examples = Sequence[Example | Pair]


class Data(NamedTuple):
    """What is trained, and what the model is evaluated on."""

    name: str  # of the source: a file's or folder's without what it lies in
    train: Examples
    validation: Examples
    kind: str  # "messages", "prompt and completion", "text" or "preference pairs"
    records: int  # that the sources have, before some were split or left out
    sha256: str  # of all tokens and marks
    notices: tuple[str, ...]  # sentences on what was left out


def read_data(engine: Engine, data: str | Path, options: FinetuneOptions) -> Data:
    """Return the examples of `data`, and those of `options.validation` or a share of the former.

    Nothing that is trained is in the validation as well, however often it is written down. Which
    examples are held out as a share follows from the seed and from what they are, not from their
    order; there is at least one on each side, and a single one is trained. Raises `FinetuneError`
    that names all bad records by their places, and `OptionError` for options that do not fit them.
    """
    source = Source(engine, data, options)
    train: Examples = source.examples
    notices, count = source.notices, source.count
    if options.validation is None:
        train, held = divided(train, options.validation_share, options.seed)
        if options.validation_share and not held:
            what = "there is one example" if len(train) == 1 else "all examples are equal"
            notices.append(f"{what}, so none is held out for validation")
    else:
        other = Source(engine, options.validation, options)
        held = others(source, other)
        notices, count = [*notices, *other.notices], count + other.count
    path = Path(data).expanduser()
    name = path.name if path.exists() else str(data)
    return Data(name, train, held, source.kind, count, digest(train, held), tuple(notices))


class Source:
    """The examples of one source, all checked. Raises as `read_data` does."""

    def __init__(self, engine: Engine, data: str | Path, options: FinetuneOptions) -> None:
        self.name, self.options, self.kind = str(data), options, ""
        self.examples: list[Example | Pair] = []
        self.count = self._tokens = 0
        self._bad, self._long, self._equal = Named(), Named(), Named()
        self._keys: dict[str, None] = {}  # in their order
        encoder = Encoder(engine, options)
        for place, raw in raw_records(data):
            self.count += 1
            try:
                self.examples += self._examples(encoder, place, raw)
            except Overlong as error:
                self._long.add(f"{place} {error}")
            except FinetuneError as error:
                self._bad.add(f"{place} {error}")
            except PromptError as error:
                self._bad.add(f"{place} cannot be encoded: {error}")
        self._check(encoder.length)
        self.notices = self._notices(encoder.length)

    def _examples(self, encoder: Encoder, place: str, raw: Any) -> Examples:
        """Return the examples of one record."""
        kind = kind_of(raw)
        if kind != self.kind:
            if self.kind:
                what = f"has the keys of {kind}, but the source begins with {self.kind}"
                raise FinetuneError(f"{what}; give a file for each kind")
            check_options(kind, self.options)
            self.kind = kind
        record = checked(kind, raw)
        self._keys.update(dict.fromkeys(raw))
        if isinstance(record, Preference) and equal_answers(record):
            self._equal.add(place)
            return []
        found = encoder(record, f"{self.name}, {place}")
        self._tokens += sum(len(one.tokens) for example in found for one in sequences_of(example))
        if self._tokens > MAX_TOKENS:
            raise OptionError(f"{self.name} has more than {MAX_TOKENS:,} tokens; give a part of it")
        return found

    def _check(self, length: int) -> None:
        """Raise `FinetuneError` that names all that cannot be trained, if there is any."""
        problems = []
        if self._bad.count:
            number = f"{self._bad.count:,} of {self.count:,} records cannot be trained"
            problems.append(f"{number}: {self._bad}")
        if self._long.count and self.options.overlong != "skip":
            split = ", split divides conversations between exchanges" * (self.kind == MESSAGES)
            remedy = f"raise length, or set overlong: skip leaves them out{split}"
            problems.append(f"{self._too_long(length)}: {self._long}; {remedy}")
        if problems:
            raise FinetuneError(f"{self.name}: {'. '.join(problems)}")
        if not self.examples:
            left = f"all of its {self.count:,} were left out" if self.count else "it is empty"
            raise FinetuneError(f"{self.name} has no records to train: {left}")

    def _notices(self, length: int) -> list[str]:
        """Return sentences on what is not trained."""
        said = []
        if self._long.count:
            said.append(f"{self._too_long(length)}, and are left out: {self._long}")
        if self._equal.count:
            what = f"{self._equal.count:,} of {self.count:,} pairs have equal answers"
            said.append(f"{what}, and are left out: {self._equal}")
        read = (*KEYS[self.kind], *["prompt"] * (self.kind == PAIRS))
        if unread := [shown(key) for key in self._keys if key not in read]:
            said.append(f"keys that are not read: {', '.join(unread):.200}")
        return [f"{self.name}: {text}" for text in said]

    def _too_long(self, length: int) -> str:
        count = f"{self._long.count:,} of {self.count:,} records"
        return f"{count} are longer than a row of {length:,} tokens"


class Named:
    """A count of records, and what is said of the first of them."""

    def __init__(self) -> None:
        self.count, self._first = 0, list[str]()

    def add(self, text: str) -> None:
        self.count += 1
        if self.count <= NAMED:
            self._first.append(text if len(text) <= QUOTED else f"{text[: QUOTED - 3]}...")

    def __str__(self) -> str:
        more = [f"and {self.count - NAMED:,} more"] if self.count > NAMED else []
        return "; ".join([*self._first, *more])


def check_options(kind: str, options: FinetuneOptions) -> None:
    """Raise `OptionError` for options that make no sense for records of this kind."""
    if kind == PAIRS:
        check_unset(options, "train_on", "of preference pairs it is the last answers that count")
        check_unset(options, "z_loss", "the losses of preference pairs have none")
        return
    for name in ("preference", "beta"):
        check_unset(options, name, f"the data are {kind}, not preference pairs; leave it out")
    if kind == TEXT and options.train_on not in (None, "all"):
        raise OptionError(f"train_on is {options.train_on}, but text has no answers; leave it out")


def mark_of(example: Example | Pair, seed: int = 0) -> bytes:
    """Return what stands for an example's tokens and what of them is trained, by the seed."""
    found = blake2b(digest_size=16, key=str(seed).encode())
    for one in sequences_of(example):
        for part in (len(one.tokens).to_bytes(8, "little"), one.tokens, one.trained):
            found.update(part)
    return found.digest()


def divided(examples: Examples, share: float, seed: int) -> tuple[Examples, Examples]:
    """Return examples without a share of them, and that share; equal ones lie on one side."""
    if not share:
        return examples, []
    marks = [mark_of(example, seed) for example in examples]
    ranked = sorted(set(marks))
    held = set(ranked[: min(max(1, round(share * len(ranked))), len(ranked) - 1)])
    pairs = [(example, mark in held) for example, mark in zip(examples, marks, strict=True)]
    return [one for one, out in pairs if not out], [one for one, out in pairs if out]


def others(source: Source, other: Source) -> Examples:
    """Return the examples of the other source that the first does not have."""
    if (source.kind == PAIRS) != (other.kind == PAIRS):
        what = f"{other.name} has {other.kind}, but {source.name} has {source.kind}"
        raise FinetuneError(f"{what}; validation must be of the same kind")
    trained = {mark_of(example) for example in source.examples}
    held = [example for example in other.examples if mark_of(example) not in trained]
    if again := len(other.examples) - len(held):
        what = f"{other.name}: {again:,} of {len(other.examples):,} examples are trained as well"
        if not held:
            raise FinetuneError(f"{what}; give others for validation, or leave it out")
        other.notices.append(f"{what}, and are left out here")
    return held


def digest(*parts: Examples) -> str:
    """Return the SHA-256 of what stands for all examples, part by part."""
    found = sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        for example in part:
            found.update(mark_of(example))
    return found.hexdigest()
