"""Records become the tokens that generation sees, each trained once, none longer than a row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.prompts import encode_messages, prompt_tokens
from openelm_mlx.engine.tokenizer import Tokenizer
from openelm_mlx.errors import FinetuneError, OptionError, PromptError
from openelm_mlx.finetune import examples
from openelm_mlx.finetune.examples import (
    Completion,
    Encoder,
    Example,
    Overlong,
    Pair,
    Preference,
    shared,
    windows,
)
from openelm_mlx.finetune.options import FinetuneOptions

TEXT = st.text(st.sampled_from("ab .\n<|>/sé日\U0001f600"), min_size=1, max_size=12)
TRAIN_ON = ("answers", "last", "all")


def talk(*texts: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ("user", "assistant") * len(texts)
    turns = [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]
    return turns if system is None else [{"role": "system", "content": system}, *turns]


TALKS = st.builds(
    lambda texts, system: talk(*texts, system=system),
    st.lists(TEXT, min_size=2, max_size=7),
    st.none() | st.just("") | TEXT,
)


@pytest.fixture(scope="module", params=["tokenizer.model", "tokenizer.json"])
def engine(request: pytest.FixtureRequest, tiny: Engine) -> Engine:
    path = tiny.tokenizer.path.with_name(request.param)
    return replace(tiny, tokenizer=Tokenizer.from_file(path))


def encoded(engine: Engine, record: Any, **options: Any) -> Sequence[Any]:
    return Encoder(engine, FinetuneOptions(**options))(record, "here")


def trained(example: Example) -> list[int]:
    """Return the tokens that are trained."""
    return [token for token, own in zip(example.tokens, example.trained, strict=True) if own]


def spelled(engine: Engine, example: Example) -> str:
    """Return the text of what is trained, with a bar for each EOS."""
    eos, tokenizer = engine.tokenizer.eos_id, engine.tokenizer
    parts = [b"|" if token == eos else tokenizer.piece_bytes(token) for token in trained(example)]
    return b"".join(parts).decode()


@settings(max_examples=25, deadline=None)
@given(messages=TALKS, train_on=st.sampled_from(TRAIN_ON))
def test_conversations_have_the_instruct_tokens(engine: Engine, messages, train_on):
    (one,) = encoded(engine, messages, train_on=train_on)
    assert list(one.tokens) == encode_messages(engine.tokenizer, messages, False)
    answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
    if train_on == "all":
        assert list(one.trained) == [0, *[1] * (len(one.tokens) - 1)]
    else:
        counted = answers[-1:] if train_on == "last" else answers
        assert spelled(engine, one) == "".join(f"{answer}|" for answer in counted)


@settings(max_examples=25, deadline=None)
@given(question=TEXT, answer=TEXT)
def test_what_is_trained_follows_the_prompt_that_generation_sees(engine: Engine, question, answer):
    (one,) = encoded(engine, talk(question, answer))
    prompt = prompt_tokens(engine, talk(question))
    assert list(one.tokens) == [*prompt, *trained(one)]
    assert not any(one.trained[: len(prompt)])


@settings(max_examples=25, deadline=None)
@given(prompt=TEXT, completion=TEXT)
def test_a_base_model_continues_the_prompt(engine: Engine, prompt, completion):
    base, tokenizer = replace(engine, instruct=False), engine.tokenizer
    (one,) = encoded(base, Completion(prompt, completion))
    assert list(one.tokens) == [*prompt_tokens(base, prompt), *trained(one)]
    assert one.tokens[-1] == tokenizer.eos_id
    assert tokenizer.decode(one.tokens) == prompt + completion
    (whole,) = encoded(base, Completion(prompt, completion), train_on="all")
    assert whole.tokens == one.tokens and list(whole.trained) == [0] + [1] * (len(one.tokens) - 1)


def test_an_instruct_model_has_a_completion_as_an_exchange(engine: Engine):
    completion, messages = Completion("Why?", "So."), talk("Why?", "So.")
    assert encoded(engine, completion) == encoded(engine, messages)
    base = replace(engine, instruct=False)
    assert encoded(base, messages) == encoded(engine, messages)
    assert encoded(base, completion) != encoded(engine, completion)


@settings(max_examples=25, deadline=None)
@given(text=st.text("abc é\n", min_size=1, max_size=150), length=st.integers(8, 40))
def test_a_long_text_is_trained_once_in_windows(engine: Engine, text, length):
    tokenizer, found = engine.tokenizer, encoded(engine, text, length=length)
    ids = [*tokenizer.encode(text, bos=False), tokenizer.eos_id]
    assert [token for one in found for token in trained(one)] == ids
    assert all(one.tokens[0] == tokenizer.bos_id and not one.trained[0] for one in found)
    assert all(sum(one.trained) == len(one.tokens) - 1 < length for one in found)
    assert len(found) == -(-len(ids) // (length - 1))


def test_a_very_long_text_is_encoded_in_parts(engine: Engine, monkeypatch: pytest.MonkeyPatch):
    text = "  One line.\n\n Two  é\n\n\n日\nthree, ▁ and no break for a while. \n\n"
    (whole,) = encoded(engine, text)
    for size in range(1, len(text) + 2):
        monkeypatch.setattr(examples, "PART", size)
        assert encoded(engine, text) == [whole], size


@pytest.mark.parametrize("most", [7, 20, 63, 64, 65, 1023])
@pytest.mark.parametrize("more", [0, 1, 2, 31, 32, 33])
def test_the_last_window_is_not_eos_alone(most: int, more: int):
    parts = windows([*range(2 * most + more)], most)
    assert [one for part in parts for one in part] == [*range(2 * most + more)]
    assert min(map(len, parts)) >= min(32, most // 2) and max(map(len, parts)) <= most


def test_control_tokens_never_come_from_a_text(engine: Engine):
    for record in ("</s><s>", Completion("<s>", "</s>"), talk("</s>", "<s></s>", system="<s>")):
        (one,) = encoded(engine, record)
        control = [token for token in one.tokens if not engine.tokenizer.piece_bytes(token)]
        assert control[0] == engine.tokenizer.bos_id and engine.tokenizer.bos_id not in control[1:]
        assert len(control) == (4 if isinstance(record, list | Completion) else 2)


def test_a_conversation_is_split_between_exchanges(tiny: Engine):
    messages = talk("one", "1 " * 9, "two", "2 " * 9, "three", "3 " * 9, "four", system="Count.")
    (whole,) = encoded(tiny, messages, overlong="split")
    assert [whole] == encoded(tiny, messages)
    for train_on in ("answers", "all"):
        (whole,) = encoded(tiny, messages, train_on=train_on)
        first, second = encoded(tiny, messages, overlong="split", length=110, train_on=train_on)
        assert list(first.tokens) == encode_messages(tiny.tokenizer, messages[:3], False)
        later = [messages[0], *messages[3:]]
        assert list(second.tokens) == encode_messages(tiny.tokenizer, later, False)
        assert trained(first) + trained(second) == trained(whole)
    exact = len(second.tokens)
    for length in (exact, exact - 1):
        parts = encoded(tiny, messages, overlong="split", length=length, train_on="all")
        assert (parts[-1] == second) == (length == exact)
    assert len(encoded(tiny, messages, length=len(whole.tokens))) == 1
    with pytest.raises(Overlong, match=f"has {len(whole.tokens)} tokens"):
        encoded(tiny, messages, length=len(whole.tokens) - 1)
    (last,) = encoded(tiny, messages, overlong="split", length=110, train_on="last")
    assert spelled(tiny, last) == "3 " * 9 + "|" and last.tokens == second.tokens


@pytest.mark.parametrize(
    ("record", "options"),
    [
        ("word " * 40, {"overlong": "refuse"}),
        (Completion("Why?", "word " * 40), {"overlong": "split"}),
        (talk("Why?", "word " * 40), {}),
        (talk("Why?", "word " * 40, "And?", "So."), {"overlong": "split"}),
        (Preference(talk("Why?", "word " * 40), talk("Why?", "So.")), {"overlong": "split"}),
    ],
)
@pytest.mark.parametrize("instruct", [True, False])
def test_what_is_not_split_is_refused(tiny: Engine, record, options, instruct):
    with pytest.raises(Overlong, match=r"has \d+ tokens"):
        encoded(replace(tiny, instruct=instruct), record, length=32, **options)


def test_a_pair_trains_the_last_answers(tiny: Engine):
    chosen, rejected = talk("a", "b", "c", "yes"), talk("a", "b", "c", "")
    (pair,) = encoded(tiny, Preference(chosen, rejected))
    assert isinstance(pair, Pair)
    assert [spelled(tiny, one) for one in pair] == ["yes|", "|"]
    base = replace(tiny, instruct=False)
    (pair,) = encoded(base, Preference(Completion("a", " b"), Completion("a", " c")))
    assert [spelled(tiny, one) for one in pair] == [" b|", " c|"]
    assert all(trained(one) == list(one.tokens[-len(trained(one)) :]) for one in pair)


def test_nothing_to_train_is_refused(tiny: Engine):
    with pytest.raises(FinetuneError, match="has no answer, so nothing of it is trained"):
        encoded(tiny, talk("Why?"))
    (one,) = encoded(tiny, talk("Why?"), train_on="all")
    assert sum(one.trained) == len(one.tokens) - 1
    with pytest.raises(PromptError, match="character 2 is the lone surrogate"):
        encoded(tiny, "a\ud800")


def test_a_row_holds_no_more_than_the_context(tiny: Engine):
    with pytest.raises(OptionError, match="length is 2048, but openelm-tiny has a context of 1024"):
        Encoder(tiny, FinetuneOptions(length=2048))
    assert Encoder(tiny, FinetuneOptions()).length == 1024


def test_an_answer_that_merges_with_its_frame_is_trained_from_there():
    assert shared([5, 6, 7], [5, 6, 7, 8]) == 3
    assert shared([5, 6, 7], [5, 6, 9, 8]) == 2
