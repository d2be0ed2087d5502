"""Prompts become token ids: text, ids as given, or the messages of a conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import TYPE_CHECKING, Any, cast

from openelm_mlx.engine.instruct import Message, encode_messages
from openelm_mlx.engine.tokenizer import as_id
from openelm_mlx.errors import PromptError

if TYPE_CHECKING:
    from openelm_mlx.engine.loading import Engine

# text, token ids, or the messages of a conversation
Prompt = str | Sequence[int] | Sequence[Message]


def prompt_tokens(
    engine: Engine, prompt: Prompt, continued: Callable[[str], list[int]] | None = None
) -> list[int]:
    """Return the ids of a prompt: BOS and text, ids as given, or messages in the Instruct format.

    `continued` may return other ids of the same text, which go on from those that a cache holds.
    They are taken where they fit into the context. Raises `PromptError`.
    """
    limit = engine.config.max_context_length
    if isinstance(prompt, str):
        if not prompt:
            raise PromptError("the prompt is empty; give at least one character")
        tokens = engine.tokenizer.encode(prompt)
        more = tokens if continued is None else continued(prompt)
        tokens = more if len(more) <= limit else tokens
    elif isinstance(prompt, Sequence) and prompt and isinstance(prompt[0], Mapping):
        tokens = encode_messages(engine.tokenizer, cast("Sequence[Message]", prompt))
    else:
        tokens = token_ids(prompt)
        if wrong := [token for token in tokens if not 0 <= token < engine.config.vocab_size]:
            raise PromptError(
                f"token id {wrong[0]} is outside the vocabulary of {engine.config.vocab_size}"
            )
    if len(tokens) > limit:
        raise PromptError(
            f"the prompt has {len(tokens)} tokens; the model's context holds {limit}. Shorten the prompt"
        )
    return tokens


def token_ids(given: Any) -> list[int]:
    """Return a list of ids from any iterable of integers, also a numpy or MLX array.

    Raises `PromptError`.
    """
    listed = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(given, (bytes, bytearray, memoryview, Mapping, Set)) or not isinstance(
        listed, Iterable
    ):
        raise PromptError(
            f"the prompt is of type {type(given).__name__}; give text, a list of token ids or a list of messages"
        )
    ids = []
    for place, token in enumerate(listed, 1):
        try:
            ids.append(as_id(token))
        except TypeError:
            raise PromptError(
                f"number {place} of the prompt is of type {type(token).__name__}; a list is one of token ids, which are "
                "integers, or of messages. Give text as one string"
            ) from None
    if not ids:
        raise PromptError("the prompt is empty; give at least one token")
    return ids
