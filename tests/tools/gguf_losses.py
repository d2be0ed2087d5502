"""What GGUF files lose against the float32 file that they were made from, in nats.

    python tests/tools/gguf_losses.py float32.gguf heldout.txt FILE...

prints, for each FILE, its bytes, the mean KL divergence, the perplexity and how often the likeliest
token is the same, on the first 6,000 tokens of the text in rows of 256. The files may come from
this project or from llama-quantize; both are read by this project's reader.
"""

from __future__ import annotations

import sys
from pathlib import Path

from openelm_mlx.convert.sources.gguf import GGUFFile
from openelm_mlx.evaluate.compare import compare
from openelm_mlx.evaluate.perplexity import text_batches
from openelm_mlx.model.config import expected_tensors
from openelm_mlx.model.decoder import OpenELM

TOKENS, ROW = 6000, 256


def model_of(file: GGUFFile) -> OpenELM:
    model = OpenELM(file.config)
    model.load_weights([(name, file.load_exact(name)) for name in expected_tensors(file.config)])
    return model


def main(original: Path, text: Path, *files: Path) -> None:
    source = GGUFFile(original)
    exact, tokenizer = model_of(source), source.tokenizer
    if tokenizer is None:
        raise SystemExit(f"{original} has no tokenizer; give a GGUF file of openelm convert")
    ids = tokenizer.processor.encode(text.read_text(encoding="utf-8"))[:TOKENS]
    batches = text_batches(ids, ROW)
    for path in files:
        found = compare(exact, model_of(GGUFFile(path)), batches)
        print(
            f"{path} {path.stat().st_size:,} bytes, KL {found.mean_kl_divergence:.6f}, perplexity "
            f"{found.perplexity:.3f}, the same token {found.top_1_agreement:.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
