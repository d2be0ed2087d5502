"""Text to ids and back, with SentencePiece itself; and text that arrives token by token."""

from __future__ import annotations

import codecs
import hashlib
import json
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from openelm_mlx.errors import PromptError, TokenizerError
from openelm_mlx.model.config import MAX_PADDING, OpenELMConfig

Encoder = Callable[[str, bool], list[int]]  # text, and whether it continues earlier text

FILES = ("tokenizer.model", "tokenizer.json")  # of a model folder, the better one first
MAX_BYTES = 16 << 20  # LLaMA's tokenizer.json has 1.8 MB
SPACE = "▁"  # SentencePiece's mark for a space
UNKNOWN = " \u2047 ".encode()  # SentencePiece's text of the unknown token
# Appended to a serialized SentencePiece model, this overrides one field of it, as protocol buffers
# merge what follows: normalizer_spec (field 3, 2 bytes) { add_dummy_prefix (field 3): false }
NO_DUMMY_PREFIX = bytes([3 << 3 | 2, 2, 3 << 3, 0])


@dataclass(eq=False, repr=False)
class Tokenizer:
    """A LLaMA-style tokenizer. User text is never parsed for control tokens such as `</s>`."""

    pieces: list[bytes]  # as `piece_bytes` gives them
    encoder: Encoder
    path: Path
    fingerprint: str  # sha256 of the file
    bos_id: int = 1
    eos_id: int = 2

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.model or else tokenizer.json. Raises `TokenizerError`."""
        for name in FILES:
            if (Path(folder) / name).is_file():
                return cls.from_file(Path(folder) / name)
        what = f"{folder} has neither {' nor '.join(FILES)}"
        raise TokenizerError(f"{what}; pass --tokenizer with the path of one")

    @classmethod
    def from_file(cls, path: str | Path) -> Tokenizer:
        """Read one file. Raises `TokenizerError` if it is damaged or not a tokenizer."""
        path = Path(path)
        data = tokenizer_data(path)
        read = _read_json if is_json(data) else _read_sentencepiece
        try:
            pieces, encoder, bos, eos = read(data)
            if min(bos, eos) < 0:
                raise ValueError("it lacks <s> or </s>")
        except Exception as error:  # both libraries raise bare and varied types on damaged files
            raise TokenizerError(
                f"{path} is damaged or not a tokenizer ({error}); fetch it again, "
                "or pass --tokenizer with the path of another"
            ) from error
        return cls(pieces, encoder, path, hashlib.sha256(data).hexdigest(), bos, eos)

    @property
    def vocab_size(self) -> int:
        """The number of pieces; ids are below it."""
        return len(self.pieces)

    def same_pieces(self, other: Tokenizer) -> bool:
        """Return whether every id stands for the same text in both, whatever their files are."""
        return self.pieces == other.pieces

    def encode(self, text: str, bos: bool = True, continued: bool = False) -> list[int]:
        """Return the ids of `text`, the dummy prefix included, after the start token if `bos`.

        Text that is `continued` goes on from earlier text and has no dummy prefix: then
        decode(earlier ids + these) is the joined text. Raises `PromptError` as `check_text` does.
        """
        check_text(text)
        ids = list(self.encoder(text, continued))
        return [self.bos_id, *ids] if bos else ids

    def piece_bytes(self, token: int) -> bytes:
        """Return the UTF-8 bytes of one piece, its spaces real ones; b"" for control tokens.

        Raises `TokenizerError` for an id outside the vocabulary.
        """
        if not 0 <= token < self.vocab_size:
            raise TokenizerError(f"token {token} lies outside the vocabulary of {self.vocab_size}")
        return self.pieces[token]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`, without the dummy prefix's space. Raises `TokenizerError`."""
        listed: Any = ids.tolist() if hasattr(ids, "tolist") else ids
        try:
            data = b"".join(self.piece_bytes(as_id(token)) for token in listed)
        except TypeError:
            what = "only token ids, which are integers, can be decoded"
            raise TokenizerError(f"{what}; give a list of them") from None
        return data.removeprefix(b" ").decode("utf-8", errors="replace")


def tokenizer_data(path: Path) -> bytes:
    """Return the content of a tokenizer's file, without a byte order mark.

    Raises `TokenizerError` if it cannot be read, or is no tokenizer of LLaMA's by its size or for
    a regular expression, which could run for ever on some text.
    """
    remedy = "pass --tokenizer with the path of a tokenizer.model"
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        what = f"{path} cannot be read: {error.strerror or error}"
        raise TokenizerError(f"{what}; {remedy}") from None
    if len(data) > MAX_BYTES:
        raise TokenizerError(f"{path} is not a tokenizer: it has more than {MAX_BYTES} bytes")
    if is_json(data) and b'"Regex"' in data:
        raise TokenizerError(f"{path} is not a tokenizer of LLaMA's kind: it has a regex; {remedy}")
    return data.removeprefix(codecs.BOM_UTF8)


def is_json(data: bytes) -> bool:
    """Return whether a tokenizer is a tokenizer.json, whatever its name is."""
    return data.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{"


def check_vocabulary(path: Path, pieces: int, config: OpenELMConfig) -> None:
    """Raise `TokenizerError` if a tokenizer of so many pieces belongs to another model."""
    if not 0 <= config.vocab_size - pieces <= MAX_PADDING:
        raise TokenizerError(
            f"{path} has {pieces} pieces, but the model {config.vocab_size} rows of embeddings: "
            "this is another model's tokenizer; give the right one with --tokenizer"
        )


def as_id(token: Any) -> int:
    """Return a token id, also one of numpy, as a Python integer. Raises `TypeError` for others."""
    if isinstance(token, bool):
        raise TypeError("a bool is not a token id")
    return operator.index(token)


def check_text(text: str) -> None:
    """Raise `PromptError` for what is not a text, or has lone surrogates, which UTF-8 lacks."""
    if not isinstance(text, str):
        raise PromptError(f"the text is of type {type(text).__name__}; give a str")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        lone = text[error.start]
        advice = "It is half a character of UTF-16; give the other half with it, or neither"
        if "\udc80" <= lone <= "\udcff":  # Python decodes an invalid byte to one of these
            example = "for example with iconv -f latin1 -t utf-8"
            advice = f"Convert what it came from to UTF-8 first, {example}"
        what = f"character {error.start + 1} is the lone surrogate {lone!a}"
        raise PromptError(f"the text is not valid UTF-8: {what}. {advice}") from None


class StreamingDecoder:
    """Decodes tokens as they come: to what decode(prompt + tokens) adds to decode(prompt).

    It never returns half a character. Without a `prompt` the tokens begin the text, and the dummy
    prefix's space is left out. A character that is cut off at the end of a prompt is part of the
    prompt's text, as the replacement character.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        tail = b""
        for token in reversed(prompt):
            tail = tokenizer.piece_bytes(token) + tail
            if len(tail) >= 4:  # no character has more bytes
                break
        self._tokenizer, self._at_start = tokenizer, not tail
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._utf8.decode(tail)
        # replacement characters at the end of the prompt's text, which are not returned again
        self._shown = len(self.pending.decode("utf-8", errors="replace"))

    @property
    def pending(self) -> bytes:
        """The bytes of a character that wait for the rest of it."""
        return self._utf8.getstate()[0]

    def push(self, token: int) -> str:
        """Return the text that is safe to print after one more token."""
        data = self._tokenizer.piece_bytes(token)
        if data and self._at_start:
            data = data.removeprefix(b" ")
            self._at_start = False
        return self._new(self._utf8.decode(data))

    def flush(self) -> str:
        """Return a replacement character for a dangling byte, or nothing."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return self._new(text)

    def _new(self, text: str) -> str:
        shown, self._shown = self._shown, max(self._shown - len(text), 0)
        return text[shown:]


class TextFilter:
    """Keeps decoded text back while its end could still be the beginning of a stop string.

    stop "END":  after "...the E" it returns "...the ", after "N" nothing, after "joy" "ENjoy"; had
    "D" come instead, it would return nothing, and have `stopped`.

    Of several stop strings the match that begins first in the text wins, however the text is cut
    into tokens: a shorter match waits while a longer one that began before it may still come true.
    """

    def __init__(self, decoder: StreamingDecoder, stop: tuple[str, ...]) -> None:
        self.decoder, self.stop = decoder, stop
        self.stopped, self._waiting = False, ""

    def push(self, token: int) -> str:
        """Return the text that is safe to show after one more token."""
        return self._release(self.decoder.push(token), final=False)

    def flush(self) -> str:
        """Return the text that was kept back, as no more tokens will come."""
        return self._release(self.decoder.flush(), final=True)

    def _release(self, text: str, final: bool) -> str:
        if self.stopped:
            return ""
        text = self._waiting + text
        match = min((text.index(stop) for stop in self.stop if stop in text), default=len(text))
        longest = max((len(stop) - 1 for stop in self.stop), default=0)
        first = match if final else max(len(text) - longest, 0)
        undecided = [
            place
            for place in range(first, match)
            if any(stop.startswith(text[place:]) for stop in self.stop)
        ]
        end = undecided[0] if undecided else match
        self.stopped = end == match < len(text)
        self._waiting = "" if self.stopped else text[end:]
        return text[:end]


def spelling(
    tokenizer: Tokenizer, tokens: Iterable[int], text: str, words: bool = False
) -> tuple[int, int]:
    """Return how many of the first `tokens` spell a beginning of `text`, and its length.

    They end with a complete character. Where the next token goes on otherwise than `text` and
    `words` are asked for, they end with the last word that both share.
    """
    decoder, count, place, kept = StreamingDecoder(tokenizer), 0, 0, (0, 0)
    for count, token in enumerate(tokens, 1):
        shown = decoder.push(token)
        if not text.startswith(shown, place):
            return kept
        place += len(shown)
        if not decoder.pending and not (words and text[place : place + 1].strip()):
            kept = count, place
    shown = decoder.flush()
    return (count, place + len(shown)) if text.startswith(shown, place) else kept


def _spelled(name: str, control: bool, unknown: bool, byte: bool) -> bytes:
    """Return the UTF-8 bytes of a piece; a piece that stands for one byte is named <0xE2>, say."""
    if unknown:
        return UNKNOWN
    if control:
        return b""
    return bytes([int(name[3:5], 16)]) if byte else name.replace(SPACE, " ").encode()


def _read_sentencepiece(data: bytes) -> tuple[list[bytes], Encoder, int, int]:
    from sentencepiece import SentencePieceProcessor

    @cache
    def processor(continued: bool) -> Any:
        made = SentencePieceProcessor()
        made.LoadFromSerializedProto(data + NO_DUMMY_PREFIX if continued else data)
        return made

    def encoder(text: str, continued: bool) -> Any:
        return processor(continued).EncodeAsIds(text)

    model = processor(False)
    pieces = [
        _spelled(name, model.IsControl(i), model.IsUnknown(i), model.IsByte(i))
        for i, name in enumerate(model.IdToPiece(list(range(model.GetPieceSize()))))
    ]
    return pieces, encoder, model.bos_id(), model.eos_id()


def _read_json(data: bytes) -> tuple[list[bytes], Encoder, int, int]:
    from tokenizers import Tokenizer as Fast

    @cache
    def tokenizer(continued: bool) -> Any:
        made = Fast.from_str(_without_dummy_prefix(data) if continued else data.decode())
        made.encode_special_tokens = True  # "</s>" in a user's text is spelled out
        return made

    def encoder(text: str, continued: bool) -> Any:
        return tokenizer(continued).encode(text, add_special_tokens=False).ids

    fast = tokenizer(False)
    special = {i for i, t in fast.get_added_tokens_decoder().items() if t.special}
    names = [fast.id_to_token(i) or "" for i in range(fast.get_vocab_size())]
    pieces = [
        _spelled(name, i in special, name == "<unk>", re.fullmatch("<0x..>", name) is not None)
        for i, name in enumerate(names)
    ]
    ids = (fast.token_to_id(name) for name in ("<s>", "</s>"))
    bos, eos = (-1 if number is None else number for number in ids)
    encoder("\u0378", False)  # in no vocabulary: raises if there is no token for the unknown
    return pieces, encoder, bos, eos


def _without_dummy_prefix(data: bytes) -> str:
    """Return a tokenizer.json without the steps that prepend a space: Prepend and Metaspace."""

    def changed(part: Any) -> Any:
        if not isinstance(part, dict):
            return part
        if part.get("type") == "Metaspace":
            return {**part, "prepend_scheme": "never"}
        nested = {
            key: [one for one in map(changed, part[key]) if one is not None]
            for key in ("normalizers", "pretokenizers")
            if key in part
        }
        return None if part.get("type") == "Prepend" else {**part, **nested}

    content = json.loads(data)
    steps = {key: changed(content.get(key)) for key in ("normalizer", "pre_tokenizer")}
    return json.dumps({**content, **steps})
