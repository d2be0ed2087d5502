"""What is trained: a new adapter on a model's matrices, or all of its weights."""

from __future__ import annotations

from dataclasses import replace

from openelm_mlx.device import mx
from openelm_mlx.engine.loading import Engine
from openelm_mlx.finetune.options import FinetuneOptions
from openelm_mlx.model.adapters import Adapted, Adapter, LowRank, adapted, dense, lengths
from openelm_mlx.model.config import EMBEDDINGS, OpenELMConfig
from openelm_mlx.model.decoder import OpenELM


def trainable(engine: Engine, options: FinetuneOptions) -> OpenELM:
    """Return a model whose trainable parameters are those of the method; the others are frozen."""
    if options.method == "full":
        model = engine.model
        model.unfreeze()
        return model
    model = adapted(engine.model, new_adapter(engine, options), mx.float32)
    model.freeze()
    for module in model.modules():
        if isinstance(module, Adapted):
            module.unfreeze(keys=["a", "b", "m"], recurse=False)
    return model


def new_adapter(engine: Engine, options: FinetuneOptions) -> Adapter:
    """Return an adapter that changes nothing yet, begun as those of PEFT and CoreNet are.

    `a` is uniform within 1 / sqrt(columns), that of the embedding normal, and `b` is zero. Of the
    embedding the input side is adapted, by LoRA in DoRA's place, too: CoreNet has no other.
    """
    parts = {}
    for stem, module in engine.model.named_modules():
        if stem.rpartition(".")[2] in options.targets:
            weight, embeds = dense(module), stem == EMBEDDINGS
            rows, columns = weight.shape
            shape, key = (options.rank, columns), mx.random.key(hash_of(options.seed, stem))
            bound = columns**-0.5
            uniform = mx.random.uniform(-bound, bound, shape, key=key)
            a = mx.random.normal(shape, key=key) if embeds else uniform
            m = lengths(weight) if options.method == "dora" and not embeds else None
            parts[stem] = LowRank(a, mx.zeros((rows, options.rank)), options.scale, m)
    return Adapter("new", parts)


def hash_of(seed: int, *words: object) -> int:
    """Return a seed that follows from another one and from words."""
    import hashlib

    text = " ".join(map(str, (seed, *words)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def adapter_of(model: OpenELM, name: str) -> Adapter:
    """Return the adapter that a model applies, as it is now, in the form of `form_of`.

    No form has LoRA in one matrix and DoRA in another. So beside DoRA the embedding's part gets as
    magnitudes the lengths that it has with LoRA, which is the same.
    """
    modules = {stem: m for stem, m in model.named_modules() if isinstance(m, Adapted)}
    parts = {stem: module.low_rank for stem, module in modules.items()}
    embedding = parts.get(EMBEDDINGS)
    if embedding is not None and any(part.magnitude is not None for part in parts.values()):
        merged = embedding.merged(dense(modules[EMBEDDINGS].base))
        of_columns = form_of(Adapter(name, parts), model.args) == "peft"
        parts[EMBEDDINGS] = replace(embedding, magnitude=lengths(merged, of_columns))
    return Adapter(name, parts)


def form_of(adapter: Adapter, config: OpenELMConfig) -> str:
    """Return the form of an adapter's folder: mlx-lm's, or PEFT's if only that can express it.

    In mlx-lm's an adapter of a tied embedding is one of the head as well.
    """
    tied = config.share_input_output_layers
    return "peft" if tied and EMBEDDINGS in adapter.parts else "mlx-lm"
