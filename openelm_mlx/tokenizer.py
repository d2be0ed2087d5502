"""Text to ids and back, with SentencePiece itself; and a decoder for text that arrives token by token."""

from __future__ import annotations

import codecs
import hashlib
from pathlib import Path
from typing import Any

from .errors import TokenizerError

SPACE = "▁"  # SentencePiece's mark for a space


class Tokenizer:
    """A LLaMA-style tokenizer. User text is never parsed for control tokens such as `</s>`."""

    def __init__(self, pieces: list[bytes], encoder: Any, path: Path, fingerprint: str,
                 bos_id: int = 1, eos_id: int = 2):
        self._pieces = pieces
        self._encoder = encoder
        self.path = path
        self.fingerprint = fingerprint
        self.bos_id = bos_id
        self.eos_id = eos_id

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Read tokenizer.model, or else tokenizer.json. Raises TokenizerError where neither lies."""
        for name in ("tokenizer.model", "tokenizer.json"):
            if (Path(folder) / name).is_file():
                return cls.from_file(Path(folder) / name)
        raise TokenizerError(f"{folder} holds neither tokenizer.model nor tokenizer.json; "
                             "pass --tokenizer with the path of one")

    @classmethod
    def from_file(cls, path: str | Path, sha256: str | None = None) -> Tokenizer:
        """Read one file; `sha256`, where given, must be its hash. Raises TokenizerError."""
        path = Path(path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise TokenizerError(f"cannot read the tokenizer {path}: {error.strerror}; "
                                 "pass --tokenizer with the path of a tokenizer.model") from error
        digest = hashlib.sha256(data).hexdigest()
        if sha256 is not None and digest != sha256:
            raise TokenizerError(f"{path} has the hash {digest}, expected {sha256}; fetch it again")
        read = _read_json if path.suffix == ".json" else _read_sentencepiece
        try:
            pieces, encoder, bos, eos = read(data)
        except Exception as error:  # both libraries raise bare and varied types on damaged files
            raise TokenizerError(f"{path} is damaged or no tokenizer ({error}); fetch it again, "
                                 "or pass --tokenizer with the path of another") from error
        return cls(pieces, encoder, path, digest, bos, eos)

    @property
    def vocab_size(self) -> int:
        return len(self._pieces)

    def same_pieces(self, other: Tokenizer) -> bool:
        """Whether every id stands for the same text in both, whatever file they were read from."""
        return self._pieces == other._pieces

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of `text`, dummy prefix included, after the start token where `bos`."""
        ids = list(self._encoder(text))
        return [self.bos_id, *ids] if bos else ids

    def piece_bytes(self, token: int) -> bytes:
        """UTF-8 bytes of one piece, its spaces real ones; empty for control tokens."""
        if not 0 <= token < len(self._pieces):
            raise TokenizerError(f"token {token} lies outside the vocabulary of {len(self._pieces)}")
        return self._pieces[token]

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, without the dummy prefix's space."""
        data = b"".join(self.piece_bytes(int(i)) for i in ids)
        return data.removeprefix(b" ").decode("utf-8", errors="replace")


class StreamingDecoder:
    """Text of tokens as they come: never half a character, never a space lost."""

    def __init__(self, tokenizer: Tokenizer, at_start: bool = True):
        self._tokenizer = tokenizer
        self._at_start = at_start
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token: int) -> str:
        """Text that is safe to print now."""
        data = self._tokenizer.piece_bytes(token)
        if data and self._at_start:
            data = data.removeprefix(b" ")
            self._at_start = False
        return self._utf8.decode(data)

    def flush(self) -> str:
        """A replacement character for a dangling byte, or nothing."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def _as_bytes(piece: str, is_byte: bool) -> bytes:
    return bytes([int(piece[3:5], 16)]) if is_byte else piece.replace(SPACE, " ").encode()


def _read_sentencepiece(data: bytes) -> tuple[list[bytes], Any, int, int]:
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor()
    model.LoadFromSerializedProto(data)
    count = model.GetPieceSize()
    silent = {i for i in range(count) if model.IsControl(i)}
    names = model.IdToPiece(list(range(count)))
    pieces = [b"" if i in silent else " \u2047 ".encode() if model.IsUnknown(i)
              else _as_bytes(name, model.IsByte(i)) for i, name in enumerate(names)]
    return pieces, model.EncodeAsIds, model.bos_id(), model.eos_id()


def _read_json(data: bytes) -> tuple[list[bytes], Any, int, int]:
    from tokenizers import Tokenizer as Fast

    fast = Fast.from_str(data.decode())
    fast.encode_special_tokens = True  # "</s>" in a user's text is spelled out
    special = {i for i, t in fast.get_added_tokens_decoder().items() if t.special}
    names = [fast.id_to_token(i) or "" for i in range(fast.get_vocab_size())]
    pieces = [" \u2047 ".encode() if n == "<unk>" else b"" if i in special
              else _as_bytes(n, len(n) == 6 and n.startswith("<0x") and n.endswith(">"))
              for i, n in enumerate(names)]
    bos, eos = fast.token_to_id("<s>"), fast.token_to_id("</s>")
    if bos is None or eos is None:
        raise ValueError("it has no <s> or no </s>")
    return pieces, lambda text: fast.encode(text, add_special_tokens=False).ids, bos, eos
