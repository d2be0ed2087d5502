"""OpenELM-Instruct's format by its published recipe, in tokens, so that no text can close its own
turn.

BOS, then `<|system|>\\n...`, EOS, `\\n<|user|>\\n...`, EOS, `\\n<|assistant|>\\n...`, EOS. The
recipe (apple/corenet, projects/openelm/instruction_tuning/openelm-instruct.yaml) has this template
and trains with huggingface/alignment-handbook at 70769f9 of 2024-04-11, whose
`maybe_insert_system_message` puts an empty system turn where a conversation has none. That the text
between two EOS is encoded by itself, dummy prefix included, is how Hugging Face's fast Llama
tokenizer treats special tokens. The training was not rerun here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from openelm_mlx.engine.tokenizer import Tokenizer, check_text
from openelm_mlx.errors import PromptError

Message = Mapping[str, str]
FORM = "a dict with the keys 'role' and 'content'"


def turn_tokens(tokenizer: Tokenizer, role: str, content: str, first: bool = False) -> list[int]:
    """One whole turn with its EOS; the `first` of a conversation starts with BOS, others with a
    line break.
    """
    check_text(content)  # here, where the place it names is one in the user's text
    start = "" if first else "\n"
    text = tokenizer.encode(f"{start}<|{role}|>\n{content}", bos=False)
    return [*([tokenizer.bos_id] if first else []), *text, tokenizer.eos_id]


def answer_prefix(tokenizer: Tokenizer) -> list[int]:
    """Return the ids after which the model writes its answer."""
    return tokenizer.encode("\n<|assistant|>\n", bos=False)


def check_messages(messages: Sequence[Message]) -> None:
    """Raise PromptError unless: perhaps one system turn, then user and assistant in turns."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        what = f"the messages are of type {type(messages).__name__}"
        raise PromptError(f"{what}; give a list of them, each {FORM}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            what = f"message {i + 1} is of type {type(message).__name__}"
            raise PromptError(f"{what}; give {FORM}")
    if not messages:
        raise PromptError("the conversation is empty; give at least one user message")
    offset = 1 if messages[0].get("role") == "system" else 0
    if len(messages) == offset:
        raise PromptError("the conversation has a system message only; add a user message")
    for i, message in enumerate(messages):
        role = message.get("role")
        expected = "system" if i < offset else ("user", "assistant")[(i - offset) % 2]
        if role != expected:
            raise PromptError(
                f"message {i + 1} has the role {role!r}, expected {expected!r}; allowed are one "
                "system message first, then user and assistant in turns"
            )
        if not isinstance(message.get("content"), str):
            raise PromptError(f"message {i + 1} has no text; give a string as its content")


def encode_messages(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = True
) -> list[int]:
    """Tokens of a conversation, BOS included. Raises PromptError where roles are out of order."""
    check_messages(messages)
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    ids: list[int] = []
    for i, message in enumerate(messages):
        ids += turn_tokens(tokenizer, message["role"], message["content"], first=i == 0)
    return ids + answer_prefix(tokenizer) if add_generation_prompt else ids
