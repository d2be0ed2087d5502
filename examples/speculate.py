"""Let the text itself draft tokens: the same text in fewer passes of the model."""

from openelm_mlx import load, stream_generate

engine = load("openelm-tiny", dtype="float32")
prompt = "Fly away, little bird, fly away. " * 6
plain = list(stream_generate(engine, prompt, max_tokens=48))
drafted = list(stream_generate(engine, prompt, max_tokens=48, prompt_lookup=2))
assert [event.token for event in plain] == [event.token for event in drafted]
stats = drafted[-1].stats
assert stats is not None
print("".join(event.text for event in drafted))
print(f"{stats.tokens_per_pass:.2f} tokens a pass")
