"""Run many prompts at once; each gives the text it would give alone."""

from openelm_mlx import batch_generate, generate, load

engine = load("openelm-tiny", dtype="float32")
prompts = ["Once upon a time", "The king said", "In the forest"]
results = batch_generate(engine, prompts, max_tokens=24)
for prompt, result in zip(prompts, results, strict=True):
    print(f"{prompt}{result.text}")
    assert result.text == generate(engine, prompt, max_tokens=24)
