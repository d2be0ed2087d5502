"""Records: what a user wrote becomes a text, a completion, a conversation or a pair, checked.

    {"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}]}
    {"prompt": ..., "completion": ...}
    {"text": ...}
    {"prompt": ..., "chosen": ..., "rejected": ...}, or conversations as chosen and rejected

Of a record with the keys of several, as data sets of the hub have them, the kind is the first of:
preference pairs, messages, prompt and completion, text. Keys that are not read are reported, and
those whose meaning would be lost are refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from openelm_mlx.engine.prompts import Message, check_messages
from openelm_mlx.errors import FinetuneError, PromptError
from openelm_mlx.fields import nearest, shown

PAIRS, MESSAGES, COMPLETION, TEXT = (
    "preference pairs",
    "messages",
    "prompt and completion",
    "text",
)
KEYS = {
    PAIRS: ("chosen", "rejected"),
    MESSAGES: ("messages",),
    COMPLETION: ("prompt", "completion"),
    TEXT: ("text",),
}
KNOWN = sorted({key for keys in KEYS.values() for key in keys})
ALLOWED = "messages; or prompt and completion; or text; or chosen and rejected, with a prompt"
# what other formats say with these keys would be lost, unless they have one of these values
NOTHING: tuple[Any, ...] = (None, "", [], {})
LOST: dict[str, tuple[Any, ...]] = {
    "system": NOTHING,
    "tools": NOTHING,
    "functions": NOTHING,
    "tool_calls": NOTHING,
    "function_call": NOTHING,
    "weight": (None, 1),
}


class Completion(NamedTuple):
    """A prompt and the text that is to follow it."""

    prompt: str
    completion: str


class Preference(NamedTuple):
    """Two conversations that differ in the last answer, or two completions of one prompt."""

    chosen: Sequence[Message] | Completion
    rejected: Sequence[Message] | Completion


Record = str | Sequence[Message] | Completion | Preference  # a text, a conversation, ...


def kind_of(raw: Any) -> str:
    """Return the kind of a record. Raises `FinetuneError` for what is no record."""
    if isinstance(raw, FinetuneError):  # the line could not be read
        raise raw
    if not isinstance(raw, Mapping):
        raise FinetuneError(f"is of type {type(raw).__name__}; give an object with {ALLOWED}")
    for kind, keys in KEYS.items():
        if all(key in raw for key in keys):
            return kind
    has = f"the keys {', '.join(map(shown, raw))}" if raw else "no keys"
    absent = [key for key in KNOWN if key not in raw]
    near = {key: nearest(key, absent) for key in raw if key and key not in KNOWN}
    hints = "".join(f"; {key!r} may be meant as {name!r}" for key, name in near.items() if name)
    raise FinetuneError(f"has {has:.200}; give {ALLOWED}{hints:.200}")


def checked(kind: str, raw: Mapping[str, Any]) -> Record:
    """Return a record of this kind. Raises `FinetuneError` that says what is wrong with it."""
    if kind == TEXT:
        return text_at(raw, "text")
    check_lost(raw, "")
    if kind == COMPLETION:
        return Completion(text_at(raw, "prompt"), text_at(raw, "completion"))
    return conversation(raw["messages"], "messages") if kind == MESSAGES else pair(raw)


def text_at(raw: Mapping[str, Any], key: str) -> str:
    """Return the text of a key. Raises `FinetuneError` if it is none, or nothing but space."""
    value = raw[key]
    if not isinstance(value, str):
        raise FinetuneError(f"has {shown(value)} as {key}; give a text")
    if not value.strip():
        raise FinetuneError(f"has an empty {key}")
    return value


def pair(raw: Mapping[str, Any]) -> Preference:
    """Return both sides of a pair: completions if all are texts, else conversations.

    An answer may be empty: that it is none can be why it was rejected.
    """
    prompt, sides = raw.get("prompt"), [raw["chosen"], raw["rejected"]]
    texts = [isinstance(side, str) for side in sides]
    if any(texts) and prompt is None:
        raise FinetuneError("has texts as chosen and rejected, which need a prompt")
    if all(texts) and isinstance(prompt, str):
        chosen, rejected = (Completion(text_at(raw, "prompt"), side) for side in sides)
        return Preference(chosen, rejected)
    asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    talks = [
        conversation(whole(asked, side), key, answered=True)
        for key, side in zip(KEYS[PAIRS], sides, strict=True)
    ]
    if said(talks[0])[:-1] != said(talks[1])[:-1]:
        raise FinetuneError("has chosen and rejected answers to different conversations")
    return Preference(*talks)


def whole(asked: Any, side: Any) -> Any:
    """Return the conversation of one side of a pair, which may leave out what was asked."""
    if isinstance(side, str):
        side = [{"role": "assistant", "content": side}]
    first = side[0] if isinstance(side, list) and side else None
    alone = isinstance(first, Mapping) and first.get("role") == "assistant"
    return [*asked, *side] if alone and isinstance(asked, list) else side


def conversation(messages: Any, key: str, answered: bool = False) -> Sequence[Message]:
    """Return messages that are in order, of which only the system's may be empty.

    If they have to be `answered`, they end with an answer, which may be empty, too.
    """
    try:
        check_messages(messages)
    except PromptError as error:
        raise FinetuneError(f"{key}: {error}") from None
    for number, message in enumerate(messages, 1):
        check_lost(message, f"message {number} of {key} ")
        final = answered and number == len(messages)
        if final and message["role"] != "assistant":
            raise FinetuneError(f"{key} must end with a message of the assistant")
        if not (final or message["role"] == "system" or message["content"].strip()):
            raise FinetuneError(f"message {number} of {key} is empty")
    return list(messages)


def said(messages: Sequence[Message]) -> list[tuple[str, str]]:
    """Return role and text of each message, without what else it has."""
    return [(message["role"], message["content"]) for message in messages]


def equal_answers(preference: Preference) -> bool:
    """Return whether both sides of a pair are equal, so that it teaches nothing."""
    chosen, rejected = preference
    if isinstance(chosen, Completion) or isinstance(rejected, Completion):
        return chosen == rejected
    return said(chosen[-1:]) == said(rejected[-1:])


def check_lost(given: Mapping[str, Any], what: str) -> None:
    """Raise `FinetuneError` if a key says what a conversation here cannot have."""
    for key in LOST.keys() & given.keys():
        if given[key] not in LOST[key]:
            remedy = "write it as the first message" if key == "system" else "remove it"
            raise FinetuneError(f"{what}has {key!r}, which is not trained here; {remedy}")
