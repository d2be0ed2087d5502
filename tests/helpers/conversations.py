"""What a conversation is fed, and what it would be fed next."""

from __future__ import annotations

from dataclasses import replace

from openelm_mlx import stream_generate
from openelm_mlx.engine.conversation import encode_messages


def with_context(engine, length):
    return replace(engine, config=replace(engine.config, max_context_length=length))


def ask(talk, text, **settings):
    events = list(talk.send(text, **settings))
    return [event.token for event in events], events[-1].stats


def fed(talk):
    """The tokens of each exchange, as they are saved."""
    return [one["tokens"] for one in talk.to_json()["exchanges"]]


def reads_as(engine, tokens, shown):
    """Tell whether the answer among an exchange's tokens is the text that was shown."""
    said = tokens[tokens.index(engine.tokenizer.eos_id) + 1 : -1]
    return engine.tokenizer.decode(said) in (
        "\n<|assistant|>\n" + shown,
        "\n<|assistant|>\n " + shown,
    )


def next_prompt(talk, text):
    """Return what the model should be fed next: the system turn, the saved tokens and the
    message.
    """
    messages = [{"role": "system", "content": talk.system or ""}, {"role": "user", "content": text}]
    ids, eos = encode_messages(talk.engine.tokenizer, messages), talk.engine.tokenizer.eos_id
    head = ids.index(eos) + 1
    return [*ids[:head], *(token for tokens in fed(talk) for token in tokens), *ids[head:]]


def check_next(talk, text):
    """The next answer is the one to `next_prompt`, read without any cache."""
    prompt = next_prompt(talk, text)
    options = (talk.sampling, talk.options)
    stream = stream_generate(talk.engine, prompt, *options, engine_options=talk.engine_options)
    wanted = [event.token for event in stream]
    tokens, stats = ask(talk, text)
    assert tokens == wanted and stats.prompt_tokens == len(prompt)


def said(text):
    return [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
