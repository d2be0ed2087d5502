"""Sources of every kind are read whole, and every bad line is named before the first is trained."""

from __future__ import annotations

import json
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openelm_mlx.engine.loading import Engine
from openelm_mlx.errors import FinetuneError, OptionError
from openelm_mlx.finetune import data as data_module
from openelm_mlx.finetune.data import Data, digest, divided, read_data
from openelm_mlx.finetune.examples import Pair, example
from openelm_mlx.finetune.options import FinetuneOptions

USER, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
GOOD: dict[str, dict[str, Any]] = {
    "messages": {"messages": [USER, ANSWER]},
    "prompt and completion": {"prompt": "Why?", "completion": "So."},
    "text": {"text": "Once upon a time."},
    "preference pairs": {"prompt": "Why?", "chosen": "So.", "rejected": "No."},
}
Read = Callable[..., Data]


@pytest.fixture
def read(tiny: Engine, tmp_path: Path) -> Read:
    """Read records, lines or bytes from a file; none are held out unless asked for."""

    def read(content: Any, name: str = "data.jsonl", **options: Any) -> Data:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else jsonl(content))
        how = {"validation_share": 0.0} | options if "validation" not in options else options
        return read_data(tiny, path, FinetuneOptions(**how))

    return read


def jsonl(records: Sequence[Any]) -> bytes:
    lines = [one if isinstance(one, str) else json.dumps(one) for one in records]
    return "".join(f"{line}\n" for line in lines).encode()


def refused(read: Read, content: Any, name: str = "data.jsonl", **options: Any) -> str:
    """Return what is said of bad data, without the folder of the file."""
    with pytest.raises(FinetuneError) as caught:
        read(content, name, **options)
    text = str(caught.value)
    assert "\n" not in text
    return text[text.index(name) :]


def tokens(examples: Any) -> list[Any]:
    return [[*one.tokens] if not isinstance(one, Pair) else tokens(one) for one in examples]


@pytest.mark.parametrize("kind", GOOD)
def test_each_kind_is_read(read: Read, tiny: Engine, kind: str):
    found = read([GOOD[kind], "", "  ", GOOD[kind]])
    assert (found.kind, found.records, len(found.train), found.validation) == (kind, 2, 2, [])
    assert (
        found.name == "data.jsonl"
        and found.notices == ()
        and tokens(found.train[:1]) == tokens(found.train[1:])
    )
    second = found.train[1]
    second = second.rejected if isinstance(second, Pair) else second
    assert second.where.endswith("data.jsonl, line 4")


def test_forms_of_a_file_are_equal(read: Read):
    records = [{"text": text} for text in ("One é.", "Two\u2028lines.", "Three 日.")]
    plain = jsonl([json.dumps(one, ensure_ascii=False) for one in records])
    expected = read(records).sha256
    for name, content in {
        "ascii.json": jsonl(records),
        "plain.ndjson": plain,
        "mark.jsonl": b"\xef\xbb\xbf" + plain,
        "windows.jsonl": plain.replace(b"\n", b"\r\n"),
        "unnamed": b"\n" + plain.rstrip(),
        "array.json": b"\xef\xbb\xbf" + json.dumps(records, indent=2).encode(),
        "texts.txt": b"\n<|endoftext|>\n".join(one["text"].encode() for one in records),
        "texts.md": "\r\n<|endoftext|> \r\n\r\n".join(one["text"] for one in records).encode(),
    }.items():
        assert read(content, name).sha256 == expected, name


def test_a_text_file_is_one_text(read: Read, tiny: Engine):
    text = "A line.\n\nAnother: <|endoftext|> is a divider on a line of its own only.</s>"
    (one,) = read(f"\n{text}\n".encode(), "story.txt").train
    assert [*one.tokens] == [*tiny.tokenizer.encode(text), tiny.tokenizer.eos_id]
    assert one.where.endswith("story.txt, text 1")
    parts = read(text.encode(), "story.txt", length=16)
    assert [*map(len, tokens(parts.train))] == [16, 14, 9] and parts.records == 1


BAD = {
    '{"text": "a"': "is not JSON: Expecting ',' delimiter at column 13",
    "[1]": "is of type list; give an object with messages; or prompt and completion; or text; "
    "or chosen and rejected, with a prompt",
    "7": "is of type int",
    "[" * 100_000: "is not JSON that can be read",
    "1" * 5000: "is not JSON that can be read",
    '{"txt": "a"}': "a prompt; 'txt' may be meant as 'text'",
    '{"promt": "a", "completion": "b"}': "'promt' may be meant as 'prompt'",
    '{"question": 1, "answer": 2}': "has the keys 'question', 'answer'; give messages",
    "{}": "has no keys; give",
    json.dumps({"messages": [{"role": "a\n" * 1000}]}): "message 1 has the role 'a\\na\\na",
    '{"text": 3}': "has 3 as text; give a text",
    '{"text": null}': "has None as text; give a text",
    '{"text": " \\n"}': "has an empty text",
    '{"text": "a\\ud800"}': "cannot be encoded: the text is not valid UTF-8: character 2",
    '{"prompt": "", "completion": "b"}': "has an empty prompt",
    '{"prompt": "a", "completion": "b", "system": "c"}': "has 'system', which is not trained here; "
    "write it as the first message",
    '{"messages": []}': "messages: the conversation is empty",
    '{"messages": "a"}': "messages: the messages are of type str",
    '{"messages": [{"role": "user", "content": "a"}]}': "has no answer, so nothing of it is",
    '{"messages": [{"from": "human", "value": "a"}]}': "message 1 has the role None, expected",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}': "message "
    "2 has the role 'user', expected 'assistant'",
    '{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}]}': ""
    "message 1 of messages is empty",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": null}]}': ""
    "message 2 has no text",
    '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", '
    '"weight": 0}]}': "message 2 of messages has 'weight', which is not trained here; remove it",
    '{"chosen": "a", "rejected": "b"}': "has texts as chosen and rejected, which need a prompt",
    '{"prompt": "", "chosen": "a", "rejected": "b"}': "has an empty prompt",
    '{"prompt": 1, "chosen": "a", "rejected": "b"}': "chosen: message 1 has the role 'assistant'",
    '{"prompt": "a", "chosen": 1, "rejected": "b"}': "chosen: the messages are of type int",
    '{"prompt": "a", "chosen": [{"role": "user", "content": "a"}], "rejected": "b"}': "chosen must "
    "end with a message of the assistant",
    '{"prompt": "a", "chosen": "c", "rejected": [{"role": "user", "content": "b"}, {"role": '
    '"assistant", "content": "c"}]}': "has chosen and rejected answers to different conversations",
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named_with_its_reason(read: Read, line: str):
    start, reason = refused(read, ["", "null", line]).split("; line 3 ")
    assert start.startswith("data.jsonl: 2 of 2 records cannot be trained: line 2 is of type None")
    assert BAD[line] in reason and len(reason) <= 300


def test_all_bad_lines_are_named_together(read: Read):
    good = json.dumps(GOOD["text"]).encode()
    lines = [good, b'{"text": "\xff"}', b"{", good] + [b'{"text": ""}'] * 20
    text = refused(read, b"\n".join(lines))
    assert text.startswith(
        "data.jsonl: 22 of 24 records cannot be trained: line 2 is not UTF-8 at "
    )
    assert "byte 11; line 3 is not JSON" in text and "line 5 has an empty text; line 6" in text
    assert text.endswith("line 12 has an empty text; and 12 more")
    text = refused(read, [GOOD["text"], GOOD["messages"], GOOD["prompt and completion"]])
    assert "2 of 3" in text and "line 2 has the keys of messages, but the source begins" in text
    assert "with text; give a file for each kind" in text


@pytest.mark.parametrize("name", ["data.jsonl", "data.txt", "data.json"])
@pytest.mark.parametrize("content", [b"", b"\xef\xbb\xbf\r\n \n"])
def test_an_empty_file_is_refused(read: Read, name: str, content: bytes):
    assert refused(read, content, name) == f"{name} has no records to train: it is empty"


def test_over_long_records_are_named_split_or_left_out_aloud(read: Read):
    long = {"messages": [USER, {"role": "assistant", "content": "word " * 90}]}
    two = {"messages": [*long["messages"], USER, ANSWER]}
    records = [GOOD["messages"], long, two]
    text = refused(read, [*records, "{"], length=64)
    assert "1 of 4 records cannot be trained: line 4 is not JSON" in text
    assert ". 2 of 4 records are longer than a row of 64 tokens: line 2 has " in text
    assert text.endswith(
        "; raise length, or set overlong: skip leaves them out, split divides conversations "
        "between exchanges"
    )
    assert "line 3 has" in refused(read, records, length=64, overlong="split")
    found = read(records, length=64, overlong="skip")
    assert (len(found.train), found.records) == (1, 3)
    (notice,) = found.notices
    assert (
        "data.jsonl: 2 of 3 records are longer than a row of 64 tokens, and are left out: "
        in notice
    )
    assert "all of its 2 were left out" in refused(read, records[1:], length=64, overlong="skip")
    text = {"text": "word " * 90}
    assert len(read([text], length=64).train) > 1
    assert "1 of 1 records are longer" in refused(read, [text], length=64, overlong="refuse")


def test_keys_of_other_uses_are_said_and_not_read(read: Read):
    found = read([{"id": 1, **GOOD["messages"], "score": 2.0, "tools": []}, GOOD["messages"]])
    assert [*found.notices][0].endswith(
        "data.jsonl: keys that are not read: 'id', 'score', 'tools'"
    )
    both = {
        **GOOD["messages"],
        "chosen": [USER, ANSWER],
        "rejected": [USER, dict(ANSWER, content="")],
    }
    assert read([both]).kind == "preference pairs"


def test_pairs_of_conversations(read: Read):
    text = GOOD["preference pairs"]
    no = dict(ANSWER, content="No.", weight=1)
    forms = [
        text,
        {"chosen": [USER, ANSWER], "rejected": [USER, no]},
        {"prompt": "Why?", "chosen": [USER, ANSWER], "rejected": [USER, no]},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [no]},
        {"prompt": "Why?", "chosen": [ANSWER], "rejected": "No."},
    ]
    equal = {"prompt": [USER], "chosen": [ANSWER], "rejected": [dict(ANSWER, weight=1)]}
    found = read([*forms, {**text, "rejected": "So."}, equal])
    assert all(tokens([one]) == tokens(found.train[:1]) for one in found.train)
    assert (len(found.train), found.records) == (5, 7)
    assert "2 of 7 pairs have equal answers, and are left out: line 6; line 7" in found.notices[0]


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("text", {"train_on": "answers"}, "train_on is answers, but text has no answers"),
        (
            "text",
            {"beta": 0.2},
            "beta is 0.2, but the data are text, not preference pairs; leave it",
        ),
        ("preference pairs", {"train_on": "all"}, "train_on is all, but of preference pairs"),
    ],
)
def test_options_must_fit_the_kind(read: Read, kind: str, options: dict[str, Any], said: str):
    with pytest.raises(OptionError, match=said):
        read([GOOD[kind]], **options)


def test_too_many_tokens_are_refused(read: Read, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(data_module, "MAX_TOKENS", 100)
    with pytest.raises(OptionError, match="has more than 100 tokens; give a part of it"):
        read([GOOD["text"]] * 20)


@settings(max_examples=25, deadline=None)
@given(
    ids=st.lists(st.integers(3, 9), min_size=1, max_size=30),
    share=st.floats(0.01, 0.9),
    seed=st.integers(0, 9),
)
def test_a_share_is_held_out_by_seed(ids: list[int], share: float, seed: int):
    examples = [example([1, token], b"\0\1", str(place)) for place, token in enumerate(ids)]
    train, held = divided(examples, share, seed)
    assert sorted([*train, *held]) == sorted(examples)
    sides = [{one.tokens[1] for one in side} for side in (train, held)]
    assert not sides[0] & sides[1] and sides[0]
    distinct = len(set(ids))
    assert len(sides[1]) == min(max(1, round(share * distinct)), distinct - 1)
    again = divided(examples[::-1], share, seed)
    assert [sorted(side) for side in again] == [sorted(train), sorted(held)]


def test_the_share_follows_from_the_seed(read: Read):
    records = [{"text": f"Number {number}."} for number in range(40)]
    found = [read(records, validation_share=0.1, seed=seed) for seed in (0, 0, 1)]
    assert [len(one.validation) for one in found] == [4, 4, 4]
    assert tokens(found[0].validation) == tokens(found[1].validation)
    assert tokens(found[0].validation) != tokens(found[2].validation)
    assert found[0].sha256 == found[1].sha256 != found[2].sha256
    alone = read(records[:1] * 3, validation_share=0.5)
    assert (len(alone.train), len(alone.validation)) == (3, 0)
    assert alone.notices == ("all examples are equal, so none is held out for validation",)
    single = read(records[:1], validation_share=0.5)
    assert single.notices == ("there is one example, so none is held out for validation",)


def test_the_hash_is_of_all_tokens_marks_and_sides():
    a, b = example([1, 5], b"\0\1", ""), example([1, 6], b"\0\1", "")
    unmarked, cut = a._replace(trained=array("b", b"\0\0")), example([1, 5, 1], b"\0\1\0", "")
    sides = [([a, b], []), ([a], [b]), ([b], [a]), ([unmarked], [b]), ([Pair(a, b)], [])]
    assert len({digest(*one) for one in [*sides, ([Pair(cut, b)], []), ([cut], [b])]}) == 7
    assert digest([a._replace(where="elsewhere")], [b]) == digest([a], [b])


def test_validation_of_its_own_has_nothing_that_is_trained(read: Read, tmp_path: Path):
    one, two, three = ({"text": text} for text in ("One.", "Two.", "Three."))
    other = tmp_path / "other.jsonl"
    other.write_bytes(jsonl([two, three, three]))
    found = read([one, two], validation=other)
    assert tokens(found.validation) == tokens(read([three, three]).train)
    assert tokens(found.train) == tokens(read([one, two]).train) and found.records == 5
    assert found.notices[0].endswith(
        "other.jsonl: 1 of 3 examples are trained as well, and are left out here"
    )
    with pytest.raises(FinetuneError, match="3 of 3 examples are trained as well; give others"):
        read([one, two, three], validation=other)
    with pytest.raises(FinetuneError, match="has text, but .* has preference pairs; validation"):
        read([GOOD["preference pairs"]], validation=other)
    other.write_bytes(b"{")
    with pytest.raises(FinetuneError, match="other.jsonl: 1 of 1 records cannot be trained"):
        read([one], validation=other)
