"""tokenizer.json from a SentencePiece BPE model, so that other tools get the very ids SentencePiece
gives.

The merges follow from the pieces: each pair of pieces that makes up a third is a merge, ranked by
the third's score. Other tools recognise a SentencePiece decoder by its exact four steps.
"""

from __future__ import annotations

import json
from typing import Any

from openelm_mlx.convert.tokenizers.tokenizer_model import MAX_PIECE, TokenizerModel
from openelm_mlx.errors import TokenizerError
from openelm_mlx.model.config import BOS, EOS, UNK

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


def build_tokenizer_json(model: TokenizerModel) -> dict[str, Any]:
    """The content of tokenizer.json for a SentencePiece model; raises `TokenizerError`."""
    spm = model.processor
    if spm.vocab_size() < 3:
        raise TokenizerError(
            f"{model.path} has {spm.vocab_size()} pieces; <unk>, <s> and </s> must be the first three"
        )
    pieces = [spm.id_to_piece(i) for i in range(spm.vocab_size())]
    bos, unk = pieces[BOS], pieces[UNK]
    if (longest := max(map(len, pieces))) > MAX_PIECE:
        raise TokenizerError(
            f"{model.path} has a piece of {longest} characters; OpenELM's tokenizer has at most 16"
        )
    ids = {
        pieces[i]: i
        for i in range(len(pieces))
        if not (spm.is_byte(i) or spm.is_control(i) or spm.is_unknown(i))
    }
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [special(number, pieces[number]) for number in (0, 1, 2)],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [sequence_part(bos), {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                sequence_part(bos),
                {"Sequence": {"id": "A", "type_id": 0}},
                sequence_part(bos),
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {bos: {"id": bos, "ids": [BOS], "tokens": [bos]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
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
    flags = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {"id": number, "content": piece} | flags


def sequence_part(piece: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": piece, "type_id": 0}}


def merges(ids: dict[str, int], scores: list[float]) -> list[list[str]]:
    """Every pair of ordinary pieces whose join is a piece, best score of the join first."""
    found = []
    for piece, number in ids.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        for left, right in pairs:
            if left in ids and right in ids:
                found.append((-scores[number], ids[left], ids[right], left, right))
    return [[left, right] for *_, left, right in sorted(found)]


def check_ids(model: TokenizerModel, content: dict[str, Any]) -> None:
    """Both tokenizers must agree on a few hard texts, or the model is of a kind this construction
    does not cover.
    """
    from tokenizers import Tokenizer

    other = Tokenizer.from_str(json.dumps(content))
    probes = PROBES + (BYTE_PROBES if content["model"]["byte_fallback"] else ())
    for text in probes:
        if other.encode(text).ids != [BOS, *model.processor.encode(text)]:
            raise TokenizerError(
                f"{model.path} is no SentencePiece model of LLaMA's kind (BPE, identity normalization, dummy prefix): "
                f"{text!r} would get other ids in tokenizer.json"
            )


def tokenizer_config(model: TokenizerModel) -> dict[str, Any]:
    """tokenizer_config.json: any Llama class would rebuild the normalizer wrongly (leading
    spaces).
    """
    spm = model.processor
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": spm.id_to_piece(BOS),
        "eos_token": spm.id_to_piece(EOS),
        "unk_token": spm.id_to_piece(UNK),
        "clean_up_tokenization_spaces": False,
    }
