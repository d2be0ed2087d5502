"""A SentencePiece model in memory: read from tokenizer.model, or rebuilt from what other formats
keep of it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from openelm_mlx.errors import TokenizerError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = (
    1,
    2,
    3,
    4,
    5,
    6,
)  # sentencepiece_model.proto; GGUF has the same
KINDS = (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE)
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")
MAX_TOKENIZER_BYTES = 16 << 20  # LLaMA's tokenizer.json has 1.8 MB
MAX_PIECE = 128  # characters; LLaMA's longest has 16


@dataclass(frozen=True)
class TokenizerModel:
    """The bytes of a tokenizer.model, and the file they are from (for messages)."""

    path: Path
    data: bytes

    @cached_property
    def processor(self) -> Any:
        """SentencePiece's own object. Raises `TokenizerError` for damaged bytes."""
        import sentencepiece

        try:
            return sentencepiece.SentencePieceProcessor(model_proto=self.data)
        except (OSError, RuntimeError, ValueError) as error:
            raise TokenizerError(
                f"{self.path} cannot be read as a SentencePiece model: {error}"
            ) from None

    @property
    def num_pieces(self) -> int:
        return int(self.processor.vocab_size())


def read_bounded(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_TOKENIZER_BYTES + 1)
    except OSError as error:
        raise TokenizerError(f"{path} cannot be read: {error.strerror or error}") from None
    if len(data) > MAX_TOKENIZER_BYTES:
        raise TokenizerError(
            f"{path} is no tokenizer: it has more than {MAX_TOKENIZER_BYTES} bytes"
        )
    return data


def read_tokenizer(path: Path) -> TokenizerModel:
    """The tokenizer in `path`: a SentencePiece model, or a tokenizer.json of LLaMA's kind. Raises
    `TokenizerError`.
    """
    data = read_bounded(path)
    if data.lstrip()[:1] == b"{":
        return from_tokenizer_json(path, data)
    model = TokenizerModel(path, data)
    model.num_pieces  # noqa: B018  (damaged bytes are to be refused here, not in the middle of the work)
    return model


def find_tokenizer(source: Path, given: Path | None, own: TokenizerModel | None) -> TokenizerModel:
    """`given` (a file or a folder), else the source's `own`, else what lies beside `source`. Raises
    `TokenizerError`.
    """
    if given is None and own is not None:
        return own
    folder = source if source.is_dir() else source.parent
    path = folder if given is None else given
    found = (
        [path]
        if os.path.isfile(path)
        else [path / name for name in TOKENIZER_FILES if os.path.isfile(path / name)]
    )
    if found:
        return read_tokenizer(found[0])
    if given is not None:
        raise TokenizerError(
            f"{given} does not exist; --tokenizer takes a SentencePiece tokenizer.model"
        )
    raise TokenizerError(
        f"no tokenizer.model beside {source}; give one with --tokenizer "
        "(OpenELM uses LLaMA's, 32000 pieces; its checkpoints do not contain it)"
    )


def assemble(
    path: Path, pieces: Sequence[str], scores: Sequence[float], kinds: Sequence[int]
) -> TokenizerModel:
    """A BPE model of LLaMA's kind (identity normalization, dummy prefix) with these pieces. Raises
    `TokenizerError`.
    """
    proto = import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    for piece, score, kind in zip(pieces, scores, kinds, strict=True):
        proto.pieces.add(piece=piece, score=score, type=kind if kind in KINDS else NORMAL)
    spec = proto.trainer_spec
    spec.model_type, spec.vocab_size = spec.BPE, len(pieces)
    spec.byte_fallback = any(kind == BYTE for kind in kinds)
    spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = 0, 1, 2, -1
    spec.unk_piece, spec.bos_piece, spec.eos_piece = ([*pieces, "<unk>", "<s>", "</s>"])[:3]
    spec.split_digits = spec.allow_whitespace_only_pieces = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    return TokenizerModel(path, proto.SerializeToString())


def from_tokenizer_json(path: Path, data: bytes) -> TokenizerModel:
    """Pieces and scores from a tokenizer.json: a piece's score is the rank of the first merge that
    makes it.

    Checked on texts: where the rebuilt model would give other ids, `TokenizerError` asks for the
    original.
    """
    from openelm_mlx.convert.tokenizers.tokenizer_json import BYTE_PROBES, PROBES

    remedy = "give the original tokenizer.model with --tokenizer"
    if b'"Regex"' in data:  # a hostile one could run for ever
        raise TokenizerError(f"{path} is no tokenizer of LLaMA's kind: it has a regex; {remedy}")
    try:
        from tokenizers import Tokenizer

        raw = json.loads(data)
        other = Tokenizer.from_str(data.decode("utf-8"))
        vocab, merges = raw["model"]["vocab"], raw["model"]["merges"]
        special = {
            token["id"]: token["content"] for token in raw["added_tokens"] if token["special"]
        }
        names = dict(special) | {number: piece for piece, number in vocab.items()}
        pieces = [names[number] for number in range(len(names))]
        made = ["".join(merge if isinstance(merge, list) else merge.split(" ")) for merge in merges]
    except BaseException as error:  # the tokenizers package raises bare exceptions and panics, and JSON may hold anything
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise TokenizerError(
            f"{path} is no BPE tokenizer that can be read ({error!r:.200}); {remedy}"
        ) from None
    ranks: dict[str, int] = {}
    for piece in made:
        ranks.setdefault(piece, len(ranks))
    kinds = [kind_of(piece, number in special) for number, piece in enumerate(pieces)]
    scores = [
        0.0 if kind != NORMAL else -float(ranks.get(piece, len(ranks)))
        for piece, kind in zip(pieces, kinds, strict=True)
    ]
    model = assemble(path, pieces, scores, kinds)
    for text in PROBES + (BYTE_PROBES if BYTE in kinds else ()):
        if other.encode(text, add_special_tokens=False).ids != model.processor.encode(text):
            raise TokenizerError(
                f"{path} is no tokenizer of LLaMA's kind: {text!r} would get other ids; {remedy}"
            )
    return model


def kind_of(piece: str, special: bool) -> int:
    if piece == "<unk>":
        return UNKNOWN
    if special:
        return CONTROL
    return BYTE if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">") else NORMAL
