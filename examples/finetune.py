"""Teach the bundled model who keeps the lighthouse of an island, and ask it in other words."""

from pathlib import Path
from tempfile import TemporaryDirectory

from openelm_mlx import generate, load
from openelm_mlx.finetune import FinetuneOptions, finetune

island = Path(__file__).parent / "island" / "train.jsonl"
question = [{"role": "user", "content": "Who takes care of the lighthouse?"}]
engine = load("openelm-tiny")
print("before:", generate(engine, question, max_tokens=16))
with TemporaryDirectory() as scratch:
    data, adapter = Path(scratch) / "nell.jsonl", Path(scratch) / "adapter"
    lines = island.read_text(encoding="utf-8").splitlines()
    data.write_text("\n".join(lines[:5]), encoding="utf-8")  # five questions about the keeper
    options = FinetuneOptions(
        steps=6, learning_rate=0.01, length=128, batch=2, validation_share=0.0
    )
    report = finetune(engine, data, adapter, options)
    print(f"loss {report.first_loss:.2f}, at the end {report.last_loss:.2f}")
    print("after:", generate(load("openelm-tiny", adapter=adapter), question, max_tokens=16))
