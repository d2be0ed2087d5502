"""Stream a text token by token, and read what it cost."""

from openelm_mlx import load, stream_generate

engine = load("openelm-tiny")
for event in stream_generate(engine, "Once upon a time", temperature=0.7, seed=1, max_tokens=48):
    print(event.text, end="", flush=True)
print()
assert event.stats is not None
print(f"{event.stats.generation_tokens} tokens, {event.finish_reason}")
