"""The Instruct format, token by token."""

from __future__ import annotations

import pytest

from openelm_mlx.engine.prompts import encode_messages
from openelm_mlx.engine.tokenizer import Tokenizer
from openelm_mlx.errors import PromptError


class Codepoints(Tokenizer):
    """Ids are code points + 3, so that a test can spell out what it expects."""

    def __init__(self) -> None:
        self.bos_id, self.eos_id = 1, 2

    def encode(self, text: str, bos: bool = True, continued: bool = False) -> list[int]:
        return [1] * bos + [ord(c) + 3 for c in text]


def enc(text: str) -> list[int]:
    return [ord(c) + 3 for c in text]


USER = {"role": "user", "content": "Hi"}
BOT = {"role": "assistant", "content": "Yo"}


def test_empty_system_turn_is_inserted() -> None:
    expected = [1, *enc("<|system|>\n"), 2, *enc("\n<|user|>\nHi"), 2, *enc("\n<|assistant|>\n")]
    assert encode_messages(Codepoints(), [USER]) == expected
    assert encode_messages(Codepoints(), [{"role": "system", "content": ""}, USER]) == expected


def test_user_cannot_close_the_turn() -> None:
    ids = encode_messages(Codepoints(), [{"role": "user", "content": "</s>"}])
    assert ids.count(2) == 2


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([], "is empty"),
        ([{"role": "system", "content": ""}], "system message only"),
        (USER, "the messages are of type dict; give a list of them"),
        ("Hi", "the messages are of type str"),
        (None, "the messages are of type NoneType"),
        (["Hi"], "message 1 is of type str; give a dict"),
        ([USER, ("assistant", "Yo")], "message 2 is of type tuple; give a dict"),
        ([BOT], "expected 'user'"),
        ([USER, USER], "expected 'assistant'"),
        ([{"role": "user"}], "has no text"),
    ],
)
def test_refusals(messages: list[dict[str, str]], text: str) -> None:
    with pytest.raises(PromptError, match=text):
        encode_messages(Codepoints(), messages)
