"""The tokenizer and its streaming decoder, against SentencePiece itself."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import sentencepiece as spm

from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.tokenizer import StreamingDecoder, Tokenizer
from openelm_mlx.errors import PromptError, TokenizerError

TEXTS = [
    "Hello world",
    "  two spaces",
    "a  b\n\n c ",
    "",
    "né 漢字 🦙🏽",
    "</s> is text",
    "<0x41>",
    "\tx",
    " ",
]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA-like model: byte fallback, identity normalization, dummy prefix."""
    base = tmp_path_factory.mktemp("spm")
    lines = [f"Hello world number {i}, a user is here\n" for i in range(200)]
    (base / "corpus.txt").write_text("".join(lines))
    spm.SentencePieceTrainer.Train(
        input=os.fspath(base / "corpus.txt"),
        model_prefix=os.fspath(base / "tokenizer"),
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return base / "tokenizer.model"


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_streamed_and_whole(model_file: Path, text: str) -> None:
    tokenizer = Tokenizer.from_folder(model_file.parent)
    ids = tokenizer.encode(text)
    assert ids[0] == 1 and 2 not in ids
    reference = spm.SentencePieceProcessor(model_file=os.fspath(model_file))
    assert ids[1:] == reference.EncodeAsIds(text)
    assert tokenizer.decode(ids) == text
    decoder = StreamingDecoder(tokenizer)
    assert "".join(decoder.push(i) for i in ids) + decoder.flush() == text


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_json_gives_the_same_ids_and_parses_no_control_token(
    nano: Path, text: str
) -> None:
    one, other = (Tokenizer.from_file(nano / f"tokenizer.{kind}") for kind in ("model", "json"))
    assert one.encode(text) == other.encode(text) and one.decode(other.encode(text)) == text
    assert other.encode(f"{text}</s><s>") == one.encode(f"{text}</s><s>")


def test_character_is_never_split(model_file: Path) -> None:
    tokenizer = Tokenizer.from_file(model_file)
    decoder = StreamingDecoder(tokenizer)
    parts = [decoder.push(i) for i in tokenizer.encode("🦙")]
    assert [p for p in parts if p] == ["🦙"]
    decoder.push(tokenizer.encode("🦙")[-4])
    assert decoder.flush() == "\ufffd" and decoder.flush() == ""


@pytest.fixture(params=["tokenizer.model", "tokenizer.json"])
def tokenizer(tiny: Engine, request: pytest.FixtureRequest) -> Tokenizer:
    """The bundled tokenizer, from either of its files."""
    return Tokenizer.from_file(tiny.path / request.param)


def random_texts(count: int) -> Iterator[str]:
    generator = random.Random(1)
    parts = [
        "a",
        "the ",
        "Once",
        " ",
        "  ",
        "\n",
        "\t",
        "é",
        "漢",
        "🦙🏽",
        "<s>",
        "</s>",
        "<0x41>",
        "1",
    ]
    for _ in range(count):
        yield "".join(generator.choice(parts) for _ in range(generator.randint(1, 8)))


def test_a_continuation_is_encoded_as_what_follows(tokenizer: Tokenizer) -> None:
    """Its ids decode to exactly the joined text; and no piece spans a line break, behind which it
    is the text's own end.
    """
    texts = list(random_texts(2000))
    break_ids = tokenizer.encode("\n")
    for text, more in zip(texts, texts[1:], strict=False):
        continued = tokenizer.encode(more, bos=False, continued=True)
        assert tokenizer.decode(tokenizer.encode(text) + continued) == text + more
        assert break_ids + continued == tokenizer.encode("\n" + more)
    assert tokenizer.encode("", bos=False, continued=True) == []


def test_streamed_after_a_prompt_is_what_is_added_to_its_text(tokenizer: Tokenizer) -> None:
    """Wherever prompt and answer are cut apart, amid a character too, and for bytes that are no
    text.
    """
    generator = random.Random(2)
    lists = [tokenizer.encode(text) for text in random_texts(1000)]
    lists += [[1, *(generator.randrange(3, 262) for _ in range(6))] for _ in range(1000)]
    for ids in lists:
        cut = generator.randint(0, len(ids))
        decoder = StreamingDecoder(tokenizer, ids[:cut])
        streamed = "".join(decoder.push(token) for token in ids[cut:]) + decoder.flush()
        assert streamed == tokenizer.decode(ids)[len(tokenizer.decode(ids[:cut])) :]


@pytest.mark.parametrize("continued", [False, True])
def test_what_is_no_utf8_is_refused(tokenizer: Tokenizer, continued: bool) -> None:
    with pytest.raises(
        PromptError, match=r"character 4 is the lone surrogate '\\udce9'.* iconv -f latin1 -t utf-8"
    ):
        tokenizer.encode("caf\udce9", continued=continued)
    with pytest.raises(
        PromptError,
        match=r"'\\ud83d'\. It is half a character of UTF-16; give the other half with it",
    ):
        tokenizer.encode("half an emoji \ud83d", continued=continued)
    with pytest.raises(PromptError, match="the text is of type bytes; give a str"):
        tokenizer.encode(b"cafe", continued=continued)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "steps",
    [
        {"normalizer": {"type": "Prepend", "prepend": "▁"}, "pre_tokenizer": None},
        {
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Metaspace",
                "replacement": "▁",
                "prepend_scheme": "always",
                "split": False,
            },
        },
        {
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {
                        "type": "Metaspace",
                        "replacement": "▁",
                        "prepend_scheme": "first",
                        "split": False,
                    }
                ],
            },
        },
    ],
)
def test_every_form_of_the_dummy_prefix_is_known(
    tiny: Engine, tmp_path: Path, steps: dict[str, object]
) -> None:
    content = json.loads((tiny.path / "tokenizer.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer.json").write_text(json.dumps({**content, **steps}), encoding="utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("there", bos=False) == tiny.tokenizer.encode("there", bos=False)
    assert tokenizer.encode("there", bos=False, continued=True) == tiny.tokenizer.encode(
        "there", bos=False, continued=True
    )


def test_refusals(model_file: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="pass --tokenizer"):
        Tokenizer.from_folder(tmp_path)
    with pytest.raises(TokenizerError, match="cannot be read: .*; pass --tokenizer"):
        Tokenizer.from_file(tmp_path / "no.model")
    (tmp_path / "bad.model").write_bytes(b"nonsense")
    with pytest.raises(TokenizerError, match="is damaged"):
        Tokenizer.from_file(tmp_path / "bad.model")
    with pytest.raises(TokenizerError, match="outside the vocabulary of 330"):
        Tokenizer.from_file(model_file).piece_bytes(330)
    for wrong in ([9, 2.0], ["9"], [True], [None], "9", 9, None):
        with pytest.raises(
            TokenizerError, match="only token ids, which are integers, can be decoded"
        ):
            Tokenizer.from_file(model_file).decode(wrong)
