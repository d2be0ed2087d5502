"""The type that each matrix of a GGUF file gets: llama.cpp's mixtures, by role and layer.

A name such as Q4_K_M is a recipe: most matrices are Q4_K, those that lose most get more bits. The
rules are those of llama.cpp's src/llama-quant.cpp without an importance matrix; that OpenELM's
embedding is its head too, and that queries, keys and values are one matrix, counts there as here.
"""

from __future__ import annotations

from openelm_mlx.dtypes import BY_GGUF
from openelm_mlx.errors import ConversionError
from openelm_mlx.model.config import EMBEDDINGS, OpenELMConfig, expected_tensors, layer_shapes
from openelm_mlx.quantization import stem_of

# for rows that the type's blocks of 256 do not divide
FALLBACK = {
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
    "IQ4_XS": "IQ4_NL",
}
QKV, OUT, DOWN = "attn.qkv_proj", "attn.out_proj", "ffn.proj_2"


def fallen_back(mixture: str, config: OpenELMConfig) -> tuple[str, ...]:
    """Return a sentence on the matrices whose rows do not permit the type that they should have."""
    found: dict[str, int] = {}
    for name, kind in types_of(mixture, config).items():
        if name.endswith("norm.weight"):
            continue
        asked = wanted(mixture, stem_of(name), config)
        if asked != kind:
            found[f"{kind} in place of {asked}"] = found.get(f"{kind} in place of {asked}", 0) + 1
    listed = ", ".join(f"{what} ({count})" for what, count in found.items())
    return (f"matrices whose rows 256 does not divide: {listed}",) if listed else ()


def types_of(mixture: str, config: OpenELMConfig) -> dict[str, str]:
    """Return the type of every tensor of the model; vectors are F32.

    Raises `ConversionError` for rows of which no block can be made.
    """
    found = {}
    for name, shape in expected_tensors(config).items():
        kind = wanted(mixture, stem_of(name), config) if len(shape) == 2 else "F32"
        if kind in FALLBACK and shape[-1] % 256:
            kind = FALLBACK[kind]
        if kind not in BY_GGUF and shape[-1] % 32:
            raise ConversionError(
                f"{name} has rows of {shape[-1]} weights, which is not a multiple of {kind}'s 32; "
                "leave out --gguf-type and --bits"
            )
        found[name] = kind
    return found


def wanted(mixture: str, stem: str, config: OpenELMConfig) -> str:
    """Return the type of a matrix, if the length of its rows permits it."""
    base = mixture.removesuffix("_S").removesuffix("_M").removesuffix("_L")
    if base in BY_GGUF or base == "Q8_0":
        return base
    if stem == EMBEDDINGS:
        return "Q6_K"
    _, _, number, role = stem.split(".", 3)
    shapes = layer_shapes(config)
    layer, layers = int(number), len(shapes)
    eighth = layers // 8
    at_ends = layer < eighth or layer >= 7 * layers // 8
    chosen = at_ends or (layer - eighth) % 3 == 2
    shared = shapes[0].q_heads >= 4 * shapes[0].kv_heads
    better = {
        ("Q2_K", QKV): "Q4_K" if shared else "Q3_K",
        ("Q2_K", OUT): "Q3_K",
        ("Q2_K", DOWN): "Q3_K",
        ("Q3_K_M", QKV): "Q5_K" if layer < 2 else "Q4_K",
        ("Q3_K_M", OUT): "Q4_K",
        ("Q3_K_M", DOWN): "Q5_K" if layer < layers // 16 else "Q4_K",
        ("Q3_K_L", QKV): "Q5_K",
        ("Q3_K_L", OUT): "Q5_K",
        ("Q3_K_L", DOWN): "Q5_K",
        ("Q4_K_S", QKV): "Q5_K" if layer < 4 else base,
        ("Q4_K_S", DOWN): "Q5_K" if layer < eighth else base,
        ("Q4_K_M", QKV): "Q6_K" if chosen else base,
        ("Q4_K_M", DOWN): "Q6_K" if chosen else base,
        ("Q5_K_M", QKV): "Q6_K" if chosen else base,
        ("Q5_K_M", DOWN): "Q6_K" if chosen else base,
        ("IQ4_NL", QKV): "Q5_K" if shared else base,
        ("IQ4_NL", DOWN): "Q5_K" if layer < eighth else base,
        ("IQ4_XS", QKV): "Q5_K" if shared else base,
        ("IQ4_XS", DOWN): "Q5_K" if layer < eighth else base,
    }
    return better.get((mixture, role), base)
