"""The token ids that the model is fed: prompts, and the exchanges of a conversation.

The Instruct format follows OpenELM-Instruct's published recipe: BOS, `<|system|>\\n...`, EOS,
`\\n<|user|>\\n...`, EOS, `\\n<|assistant|>\\n...`, EOS. The recipe (apple/corenet,
projects/openelm/instruction_tuning/openelm-instruct.yaml) has this template and trains with
huggingface/alignment-handbook at 70769f9 of 2024-04-11, whose `maybe_insert_system_message` adds an
empty system turn if a conversation lacks one. The text between two EOS is encoded by itself,
dummy prefix included, because Hugging Face's fast Llama tokenizer treats special tokens so. The
training was not rerun here. Turns are built from ids, so no text can close its own turn.

An exchange keeps the tokens of its answer as they were generated, as far as the user saw it. A
saved conversation has the texts, and these tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from openelm_mlx.engine.tokenizer import StreamingDecoder, Tokenizer, as_id, check_text, spelling
from openelm_mlx.errors import ContextError, PromptError

if TYPE_CHECKING:
    from openelm_mlx.engine.loading import Engine

TEMPLATE = "chat_template.jinja"  # the file by which other programs know the Instruct format
CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- if not messages or messages[0]['role'] != 'system' -%}
{{- '<|system|>\\n' + eos_token -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception('role must be system, user or assistant, not ' + message['role']) -}}
{%- endif -%}
{{- ('' if loop.first and message['role'] == 'system' else '\\n') + '<|' + \
message['role'] + '|>\\n' -}}
{{- message['content'] + eos_token -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '\\n<|assistant|>\\n' -}}
{%- endif -%}
"""

Message = Mapping[str, str]
# text, token ids, or the messages of a conversation
Prompt = str | Sequence[int] | Sequence[Message]
MESSAGE = "a dict with the keys 'role' and 'content'"
SAVED = "openelm-mlx conversation 2"
READABLE = (None, "openelm-mlx conversation 1", SAVED)  # files of the first format have no tokens


def prompt_tokens(
    engine: Engine, prompt: Prompt, continued: Callable[[str], list[int]] | None = None
) -> list[int]:
    """Return the ids of a prompt: BOS and text, ids as given, or messages in the Instruct format.

    `continued` may return other ids of the same text, which go on from those in a cache. They are
    used if they fit into the context. Raises `PromptError`.
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
            size = engine.config.vocab_size
            raise PromptError(f"token id {wrong[0]} is outside the vocabulary of {size}")
    if len(tokens) > limit:
        what = f"the prompt has {len(tokens)} tokens; the model's context is {limit}"
        raise ContextError(f"{what}. Shorten the prompt")
    return tokens


def token_ids(given: Any) -> list[int]:
    """Return a list of ids from any iterable of integers, also from a numpy or MLX array.

    Raises `PromptError`.
    """
    listed = given.tolist() if hasattr(given, "tolist") else given
    unordered = isinstance(given, (bytes, bytearray, memoryview, Mapping, Set))
    if unordered or not isinstance(listed, Iterable):
        what = f"the prompt is of type {type(given).__name__}"
        raise PromptError(f"{what}; give text, a list of token ids or a list of messages")
    ids = []
    for place, token in enumerate(listed, 1):
        try:
            ids.append(as_id(token))
        except TypeError:
            raise PromptError(
                f"number {place} of the prompt is of type {type(token).__name__}; a list is one of "
                "token ids, which are integers, or of messages. Give text as one string"
            ) from None
    if not ids:
        raise PromptError("the prompt is empty; give at least one token")
    return ids


def encode_messages(
    tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool = True
) -> list[int]:
    """Return the ids of a conversation in the Instruct format, BOS included.

    With `add_generation_prompt` they end where the model writes its answer. Raises `PromptError`
    if the roles are out of order or a message has no text.
    """
    check_messages(messages)
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": ""}, *messages]
    ids: list[int] = []
    for i, message in enumerate(messages):
        ids += turn_tokens(tokenizer, message["role"], message["content"], first=i == 0)
    return ids + answer_prefix(tokenizer) if add_generation_prompt else ids


def check_messages(messages: Sequence[Message]) -> None:
    """Raise `PromptError` unless user and assistant take turns, perhaps after a system message."""
    if not isinstance(messages, Sequence) or isinstance(messages, (str, bytes)):
        what = f"the messages are of type {type(messages).__name__}"
        raise PromptError(f"{what}; give a list of them, each {MESSAGE}")
    if not messages:
        raise PromptError("the conversation is empty; give at least one user message")
    for i, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            what = f"message {i} is of type {type(message).__name__}"
            raise PromptError(f"{what}; give {MESSAGE}")
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


def turn_tokens(tokenizer: Tokenizer, role: str, content: str, first: bool = False) -> list[int]:
    """Return the ids of one turn, its EOS included.

    The `first` turn of a conversation starts with BOS, the others start with a line break. Raises
    `PromptError` as `check_text` does.
    """
    check_text(content)  # here, so that the place it names is one in the user's text
    start = "" if first else "\n"
    text = tokenizer.encode(f"{start}<|{role}|>\n{content}", bos=False)
    return [*([tokenizer.bos_id] if first else []), *text, tokenizer.eos_id]


def answer_prefix(tokenizer: Tokenizer) -> list[int]:
    """Return the ids after which the model writes its answer."""
    return tokenizer.encode("\n<|assistant|>\n", bos=False)


def decoder_after(tokenizer: Tokenizer, prompt: list[int]) -> StreamingDecoder:
    """Return a decoder of the tokens that follow a prompt.

    An answer in the Instruct format is a text of its own; any other continues the prompt's text.
    """
    frame = answer_prefix(tokenizer)
    if prompt[-len(frame) :] == frame:
        return StreamingDecoder(tokenizer)
    pieces = tokenizer.vocab_size
    return StreamingDecoder(tokenizer, [token for token in prompt if token < pieces])


@dataclass(frozen=True)
class Exchange:
    """A question, its answer as the user saw it, and the tokens that the model is fed for both."""

    question: str
    answer: str
    tokens: tuple[int, ...]  # the user's turn, the assistant's, and EOS after each
    answer_tokens: int  # how many of them are the answer's, its EOS included
    attempt: int = 0  # answers to this question that were discarded before this one

    @classmethod
    def of(
        cls, tokenizer: Tokenizer, question: str, answer: str, drawn: Sequence[int], attempt: int
    ) -> Exchange:
        """Return the exchange with the tokens `drawn` for it, as far as they spell `answer`."""
        asked = question_tokens(tokenizer, question)
        tokens = [*asked, *as_shown(tokenizer, answer, drawn), tokenizer.eos_id]
        return cls(question, answer, tuple(tokens), len(tokens) - len(asked), attempt)


def question_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Return the ids of a user's turn, and those after which the model answers it."""
    return [*turn_tokens(tokenizer, "user", text), *answer_prefix(tokenizer)]


def as_shown(tokenizer: Tokenizer, shown: str, drawn: Sequence[int]) -> list[int]:
    """Return tokens that spell `shown`: those of `drawn` that do, then the rest, encoded.

    shown  "I am th"        (the stop string "e" was found, or the answer was stopped)
    drawn  "I", " am", " the", ...  -> "I", " am", and " th" encoded
    """
    # BOS and EOS spell nothing, and do not belong inside a turn
    visible = [token for token in drawn if tokenizer.piece_bytes(token)]
    kept, place = spelling(tokenizer, visible, shown)
    return [*visible[:kept], *tokenizer.encode(shown[place:], bos=False, continued=True)]


def messages_of(exchanges: Sequence[Exchange]) -> list[dict[str, str]]:
    """Return exchanges as a list of {"role", "content"} dictionaries."""
    return [
        {"role": role, "content": text}
        for exchange in exchanges
        for role, text in (("user", exchange.question), ("assistant", exchange.answer))
    ]


def saved(system: str | None, exchanges: Sequence[Exchange], dropped: int) -> dict[str, Any]:
    """Return a conversation as JSON: its texts, and the tokens that the model is fed.

    `dropped` is the number of tokens of earlier exchanges that did not fit into the context.
    """
    return {
        "format": SAVED,
        "system": system,
        "messages": messages_of(exchanges),
        "exchanges": [{"tokens": list(one.tokens), "attempt": one.attempt} for one in exchanges],
        "dropped_tokens": dropped,
    }


def read_saved(
    tokenizer: Tokenizer, vocab: int, data: Any
) -> tuple[str | None, tuple[Exchange, ...], int]:
    """Return the arguments of `saved` from JSON.

    Saved tokens that do not spell the saved texts, such as those of another tokenizer, are replaced
    by the encoded texts. Raises `PromptError` for data that is not a saved conversation.
    """
    try:
        version, system, messages = data.get("format"), data["system"], data["messages"]
        roles = [message["role"] for message in messages]
        texts = [message["content"] for message in messages]
    except (AttributeError, KeyError, TypeError):
        needs = "it needs the keys 'system' and 'messages'"
        raise PromptError(f"this is not a saved conversation: {needs}") from None
    if version not in READABLE:
        what = f"this saved conversation has the format {version!r}"
        raise PromptError(f"{what}; this version reads up to {SAVED!r}. Update openelm-mlx")
    in_turns = roles == ["user", "assistant"] * (len(roles) // 2)
    if not in_turns or not all(isinstance(text, str) for text in texts):
        must = "must alternate texts of 'user' and 'assistant', ending with an answer"
        raise PromptError(f"a saved conversation {must}")
    for text in texts:
        check_text(text)
    details = data.get("exchanges")
    if not isinstance(details, list) or len(details) != len(texts) // 2:
        details = [None] * (len(texts) // 2)
    exchanges = []
    for question, answer, detail in zip(texts[::2], texts[1::2], details, strict=True):
        detail = detail if isinstance(detail, dict) else {}
        tokens: Any = detail.get("tokens")
        asked = question_tokens(tokenizer, question)
        own = isinstance(tokens, list) and tokens[: len(asked)] == asked
        drawn = tokens[len(asked) : -1] if own else []
        known = all(type(token) is int and 0 <= token < vocab for token in drawn)
        attempt = natural(detail.get("attempt"))
        exchanges.append(Exchange.of(tokenizer, question, answer, drawn if known else [], attempt))
    return system, tuple(exchanges), natural(data.get("dropped_tokens"))


def natural(value: Any) -> int:
    """Return a count from a saved file, or 0 if `value` is not a count."""
    return value if type(value) is int and value >= 0 else 0
