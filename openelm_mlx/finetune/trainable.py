"""What is trained: a new adapter on a model's matrices, or all of its weights."""

from __future__ import annotations

from openelm_mlx.device import mx, nn
from openelm_mlx.engine.loading import Engine
from openelm_mlx.finetune.options import FinetuneOptions
from openelm_mlx.model.adapters import Adapted, Adapter, LowRank, adapted, dense, lengths
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
    """Return an adapter that changes nothing yet: `a` is uniform within 1 / sqrt(columns), as in
    PEFT and CoreNet, and `b` is zero.
    """
    parts = {}
    scale = (options.rank if options.alpha is None else options.alpha) / options.rank
    for stem, module in engine.model.named_modules():
        if stem.rpartition(".")[2] in options.targets:
            weight = dense(module)
            rows, columns = weight.shape
            key = mx.random.key(hash_of(options.seed, stem))
            bound = columns**-0.5
            a = mx.random.uniform(-bound, bound, (options.rank, columns), key=key)
            m = lengths(weight) if options.method == "dora" else None
            parts[stem] = LowRank(a, mx.zeros((rows, options.rank)), scale, m)
    return Adapter("new", parts)


def hash_of(seed: int, *words: object) -> int:
    """Return a seed that follows from another one and from words."""
    import hashlib

    text = " ".join(map(str, (seed, *words)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def adapter_of(model: nn.Module, name: str) -> Adapter:
    """Return the adapter that a model applies, as it is now."""
    modules = model.named_modules()
    return Adapter(name, {stem: m.low_rank for stem, m in modules if isinstance(m, Adapted)})
