"""Tokenizers: a SentencePiece model, read or rebuilt, and the tokenizer.json made from it.

A model is read from tokenizer.model, or rebuilt from the parts that tokenizer.json or GGUF keep.
Encoding prompts and formatting conversations belong to the engine.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

from openelm_mlx.engine.tokenizer import FILES, is_json, tokenizer_data
from openelm_mlx.errors import TokenizerError
from openelm_mlx.model.config import BOS, EOS, UNK

KINDS = NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = (1, 2, 3, 4, 5, 6)  # as in GGUF too
MAX_PIECE = 128  # characters; LLaMA's longest has 16
PROBES = (
    "Once upon a time",
    " leading",
    "two  spaces   three",
    "trailing ",
    "line\nbreak\n\n\ttab",
    "Hello, world! 1234.5",
    "don't UPPER lower",
    "",
)
BYTE_PROBES = ("naïve café", "日本語 🙂", "\x00\x7f")


@dataclass(frozen=True)
class TokenizerModel:
    """The bytes of a tokenizer.model, and the file they come from (for messages)."""

    path: Path
    data: bytes

    @cached_property
    def processor(self) -> Any:
        """The object of the sentencepiece package. Raises `TokenizerError` for damaged bytes."""
        import sentencepiece

        try:
            return sentencepiece.SentencePieceProcessor(model_proto=self.data)
        except (OSError, RuntimeError, ValueError) as error:
            raise TokenizerError(
                f"{self.path} cannot be read as a SentencePiece model: {error}"
            ) from None

    @cached_property
    def pieces(self) -> list[str]:
        """The text of every piece. Raises `TokenizerError` for one that is not UTF-8."""
        try:
            return list(self.processor.id_to_piece(list(range(self.processor.vocab_size()))))
        except UnicodeDecodeError:
            what = "it has pieces that are not UTF-8; fetch it again"
            raise TokenizerError(f"{self.path} is damaged: {what}") from None

    @property
    def num_pieces(self) -> int:
        return len(self.pieces)


def read_tokenizer(path: Path) -> TokenizerModel:
    """Read a SentencePiece model, or a tokenizer.json of LLaMA's kind. Raises `TokenizerError`."""
    data = tokenizer_data(path)
    if is_json(data):
        return from_tokenizer_json(path, data)
    model = TokenizerModel(path, data)
    _ = model.num_pieces  # damaged bytes are refused here, not in the middle of the work
    ids = (model.processor.unk_id(), model.processor.bos_id(), model.processor.eos_id())
    if ids != (UNK, BOS, EOS):
        raise TokenizerError(
            f"{path}: its unknown, start and end tokens are {ids}; OpenELM's are 0, 1 and 2"
        )
    return model


def find_tokenizer(source: Path, given: Path | None, own: TokenizerModel | None) -> TokenizerModel:
    """Return the tokenizer `given` as a file or folder, else the source's `own`, else the one
    beside `source`. Raises `TokenizerError`.
    """
    if given is None and own is not None:
        return own
    path = given or (source if source.is_dir() else source.parent)
    candidates = [path, *(path / name for name in FILES)]
    for candidate in candidates:
        if os.path.isfile(candidate):
            return read_tokenizer(candidate)
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
    """Build a BPE model of LLaMA's kind (identity normalization, dummy prefix) from its pieces."""
    proto = import_module("sentencepiece.sentencepiece_model_pb2").ModelProto()
    for piece, score, kind in zip(pieces, scores, kinds, strict=True):
        proto.pieces.add(piece=piece, score=score, type=kind if kind in KINDS else NORMAL)
    spec = proto.trainer_spec
    spec.model_type, spec.vocab_size = spec.BPE, len(pieces)
    spec.byte_fallback = any(kind == BYTE for kind in kinds)
    spec.unk_id, spec.bos_id, spec.eos_id, spec.pad_id = UNK, BOS, EOS, -1
    spec.unk_piece, spec.bos_piece, spec.eos_piece = ([*pieces, "<unk>", "<s>", "</s>"])[:3]
    spec.split_digits = spec.allow_whitespace_only_pieces = True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    return TokenizerModel(path, proto.SerializeToString())


def from_tokenizer_json(path: Path, data: bytes) -> TokenizerModel:
    """Rebuild a model from a tokenizer.json: a piece's score is the rank of the first merge that
    makes it.

    The result is tried on texts: if it gives other ids, `TokenizerError` asks for the original.
    """
    remedy = "give the original tokenizer.model with --tokenizer"
    try:
        from tokenizers import Tokenizer

        raw = json.loads(data)
        other = Tokenizer.from_str(data.decode("utf-8"))
        vocab, merges = raw["model"]["vocab"], raw["model"]["merges"]
        added = [token for token in raw["added_tokens"] if token["special"]]
        special = {token["id"]: token["content"] for token in added}
        names = dict(special) | {number: piece for piece, number in vocab.items()}
        pieces = [names[number] for number in range(len(names))]
        made = ["".join(merge if isinstance(merge, list) else merge.split(" ")) for merge in merges]
    except BaseException as error:  # tokenizers raises bare exceptions and panics
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise TokenizerError(
            f"{path} is not a BPE tokenizer that can be read ({error!r:.200}); {remedy}"
        ) from None
    ranks: dict[str, int] = {}
    for piece in made:
        ranks.setdefault(piece, len(ranks))
    kinds = [kind_of_piece(piece, number in special) for number, piece in enumerate(pieces)]
    scores = [
        0.0 if kind != NORMAL else -float(ranks.get(piece, len(ranks)))
        for piece, kind in zip(pieces, kinds, strict=True)
    ]
    model = assemble(path, pieces, scores, kinds)
    if (text := differing_text(model, other, BYTE in kinds)) is not None:
        raise TokenizerError(
            f"{path} is not a tokenizer of LLaMA's kind: {text!r} would get other ids; {remedy}"
        )
    return model


def differing_text(
    model: TokenizerModel, other: Any, byte_fallback: bool, begin: Sequence[int] = ()
) -> str | None:
    """Return the first of a few hard texts to which `other`, of the tokenizers package, does not
    give the ids that `model` gives, after the special tokens `begin` if it is to add any.
    """
    for text in PROBES + (BYTE_PROBES if byte_fallback else ()):
        try:
            ids = other.encode(text, add_special_tokens=bool(begin)).ids
        except Exception:  # the package raises no other, for example for a vocabulary without unk
            return text
        if ids != [*begin, *model.processor.encode(text)]:
            return text
    return None


def kind_of_piece(piece: str, special: bool) -> int:
    if piece == "<unk>":
        return UNKNOWN
    if special:
        return CONTROL
    return BYTE if re.fullmatch(r"<0x..>", piece, re.DOTALL) else NORMAL


def build_tokenizer_json(model: TokenizerModel) -> dict[str, Any]:
    """Return the content of a tokenizer.json that gives the very ids SentencePiece gives.

    The merges follow from the pieces: each pair of pieces that makes up a third is a merge, ranked
    by the third's score. Other tools recognise a SentencePiece decoder by its exact four steps.
    Raises `TokenizerError`.
    """
    spm = model.processor
    if model.num_pieces < 3:
        raise TokenizerError(
            f"{model.path} has {model.num_pieces} pieces; <unk>, <s> and </s> must be the first "
            "three"
        )
    pieces = model.pieces
    bos, unk = pieces[BOS], pieces[UNK]
    if (longest := max(map(len, pieces))) > MAX_PIECE:
        raise TokenizerError(
            f"{model.path} has a piece of {longest} characters; OpenELM's tokenizer has at most 16"
        )
    odd = {
        i for i in range(len(pieces)) if spm.is_byte(i) or spm.is_control(i) or spm.is_unknown(i)
    }
    ids = {piece: number for number, piece in enumerate(pieces) if number not in odd}
    start = {"SpecialToken": {"id": bos, "type_id": 0}}
    a, b = ({"Sequence": {"id": name, "type_id": number}} for number, name in enumerate("AB"))
    to_mark = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    from_mark = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    strip = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special(number, pieces[number]) for number in (UNK, BOS, EOS)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": "▁"}, to_mark],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, a],
            "pair": [start, a, start, b],
            "special_tokens": {bos: {"id": bos, "ids": [BOS], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [from_mark, {"type": "ByteFallback"}, {"type": "Fuse"}, strip],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unk,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": any(spm.is_byte(i) for i in range(len(pieces))),
            "ignore_merges": False,
            "vocab": {piece: number for number, piece in enumerate(pieces)},
            "merges": merges(ids, [spm.get_score(i) for i in range(len(pieces))]),
        },
    }
    check_ids(model, content)
    return content


def special(number: int, piece: str) -> dict[str, Any]:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": number, "content": piece} | flags | {"special": True}


def merges(ids: dict[str, int], scores: list[float]) -> list[list[str]]:
    """Return every pair of ordinary pieces whose join is a piece, the best score first."""
    found = []
    for piece, number in ids.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        for left, right in pairs:
            if left in ids and right in ids:
                found.append((-scores[number], ids[left], ids[right], left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def check_ids(model: TokenizerModel, content: dict[str, Any]) -> None:
    """Raise `TokenizerError` if the two tokenizers differ on a few hard texts: the model is of a
    kind that tokenizer.json is not built for here.
    """
    from tokenizers import Tokenizer

    other = Tokenizer.from_str(json.dumps(content))
    text = differing_text(model, other, content["model"]["byte_fallback"], [BOS])
    if text is not None:
        raise TokenizerError(
            f"{model.path} is not a SentencePiece model of LLaMA's kind (BPE, identity "
            f"normalization, dummy prefix): {text!r} would get other ids in tokenizer.json"
        )


def tokenizer_config(model: TokenizerModel) -> dict[str, Any]:
    """Return the content of tokenizer_config.json. A Llama class would rebuild the normalizer
    wrongly (leading spaces).
    """
    spm = model.processor
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": spm.id_to_piece(BOS),
        "eos_token": spm.id_to_piece(EOS),
        "unk_token": spm.id_to_piece(UNK),
        "clean_up_tokenization_spaces": False,
    }
