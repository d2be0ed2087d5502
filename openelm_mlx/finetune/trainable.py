"""What is trained: an adapter of a model's matrices, a new one or one to go on from, or all of its
weights.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from openelm_mlx.device import mx, utils
from openelm_mlx.dtypes import name_of
from openelm_mlx.engine.loading import Engine
from openelm_mlx.errors import OptionError
from openelm_mlx.fields import shown
from openelm_mlx.finetune import options as known
from openelm_mlx.finetune.options import FinetuneOptions
from openelm_mlx.model.adapters import (
    Adapted,
    AdaptedHead,
    Adapter,
    LowRank,
    adapted,
    dense,
    lengths,
    shells,
)
from openelm_mlx.model.config import EMBEDDINGS, HEAD, OpenELMConfig
from openelm_mlx.model.decoder import OpenELM


def trainable(engine: Engine, options: FinetuneOptions) -> OpenELM:
    """Return a model whose trainable parameters are those of the method; the others are frozen.

    An adapter that the engine applies is trained further, in float32, and otherwise a new one. The
    engine's own stays as it is.
    """
    if options.method == "full":
        model = engine.model
        model.unfreeze()
        return model
    base = base_of(engine)
    model = adapted(base.model, engine.adapter or new_adapter(base, options), mx.float32)
    model.freeze()
    for module in model.modules():
        if isinstance(module, Adapted):
            module.unfreeze(keys=["a", "b", "m"], recurse=False)
    # rows after rows, as those of a checkpoint: a product's rounding depends on it
    model.update(utils.tree_map(mx.contiguous, model.trainable_parameters()))
    return model


def rounding(model: OpenELM) -> str:
    """Return what is to be said of weights that are trained in 16 bits, or "".

    bfloat16 has 8 significant bits: an update below a 512th of a weight is rounded away.
    """
    arrays: Any = utils.tree_flatten(model.trainable_parameters())
    dtype = next((name_of(array.dtype) for _, array in arrays if array.dtype != mx.float32), None)
    if dtype is None:
        return ""
    return f"The weights are trained in {dtype}, which rounds small updates away; float32 does not."


def base_of(engine: Engine) -> Engine:
    """Return the engine without the adapter that it applies."""
    if engine.adapter is None:
        return engine
    model = shells(engine.model)
    if isinstance(model.get(HEAD), AdaptedHead):
        del model.lm_head
    modules: Any = model.named_modules()
    bases = [(stem, module.base) for stem, module in modules if isinstance(module, Adapted)]
    model.update_modules(utils.tree_unflatten(bases))
    return replace(engine, model=model, name=engine.name.rpartition(" with ")[0], adapter=None)


def continued(engine: Engine, options: FinetuneOptions) -> FinetuneOptions:
    """Return the options with what the adapter that the engine applies says in their place.

    Raises `OptionError` for options that are not those of the adapter, and for one whose change no
    folder of an adapter could state.
    """
    adapter = engine.adapter
    if adapter is None:
        return options
    parts = adapter.parts
    tied = engine.config.share_input_output_layers
    if tied and HEAD in parts and parts[HEAD] is not parts.get(EMBEDDINGS):
        what = f"{adapter.name} adapts the head of a tied embedding, which no folder can state"
        raise OptionError(f"{what}; merge it with `openelm fuse`, and train what that gives")
    (rank, scale), _ = Counter((part.rank, part.scale) for part in parts.values()).most_common(1)[0]
    stems = {stem.rpartition(".")[2] for stem in parts}
    targets = tuple(name for name in (*known.TARGETS, known.EMBEDDINGS) if name in stems)
    own: dict[str, Any] = {
        "method": "lora" if all(part.magnitude is None for part in parts.values()) else "dora",
        "rank": rank,
        "alpha": scale * rank,
        "targets": options.targets if stems == {*options.targets} else targets,
    }
    for name, value in own.items():
        given = getattr(options, name)
        if given not in (value, getattr(FinetuneOptions, name)):
            what = f"{name} is {shown(given)}, but that of the adapter {adapter.name}, which is"
            raise OptionError(f"{what} trained further, is {shown(value)}; leave it")
    return replace(options, **own)


def digest(adapter: Adapter) -> str:
    """Return a hash of what an adapter does."""
    import hashlib

    found = hashlib.sha256()
    for stem, part in sorted(adapter.parts.items()):
        found.update(f"{stem} {part.scale} {part.a.shape} {part.b.shape}".encode())
        for array in (part.a, part.b, part.magnitude):
            if array is not None:
                found.update(memoryview(mx.contiguous(array)))  # type: ignore[arg-type]
    return found.hexdigest()


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
    if embedding is None:
        return Adapter(name, parts)
    if modules[EMBEDDINGS].tied:
        parts[HEAD] = embedding
    lengthy = any(part.magnitude is not None for part in parts.values())
    if lengthy and embedding.magnitude is None:
        merged = embedding.merged(dense(modules[EMBEDDINGS].base))
        of_columns = form_of(Adapter(name, parts), model.args) == "peft"
        parts[EMBEDDINGS] = replace(embedding, magnitude=lengths(merged, of_columns))
    return Adapter(name, parts)


def form_of(adapter: Adapter, config: OpenELMConfig) -> str:
    """Return the form of an adapter's folder: mlx-lm's, or PEFT's if only that can express it.

    In mlx-lm's an adapter of a tied embedding is one of the head as well.
    """
    embedding = adapter.parts.get(EMBEDDINGS)
    both = adapter.parts.get(HEAD) is embedding
    tied = config.share_input_output_layers
    return "peft" if tied and embedding is not None and not both else "mlx-lm"
