"""What mlx-lm's own quantization tools make of a model, for the comparison of quantization.py.

They are called as Python functions on the same calibration text: their command lines fetch texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from openelm_mlx.convert.sources.folder import dequantized
from openelm_mlx.device import mx, nn
from openelm_mlx.dtypes import DTYPES
from openelm_mlx.quantization import QuantSpec

DTYPE = "float16"  # of scales, biases, norms and matrices that are not quantized
TOOLS = ("mixed", "dynamic_quant", "awq", "gptq", "dwq")
Weights = dict[str, mx.array]
Result = tuple[Weights, int]  # float32 weights, and the bytes they are stored in
Method = tuple[str, Callable[[], Result]]  # the name in the table, and the work


def loaded(folder: Path) -> tuple[Any, dict[str, Any]]:
    """Load a folder with mlx-lm: the model and its configuration."""
    from mlx_lm.utils import load_model

    return load_model(folder)


def stored(model: nn.Module) -> Result:
    """Return the weights of an mlx-lm model as they would be stored with scales in `DTYPE`."""
    weights: Weights = {}
    size = 0
    for path, module in model.named_modules():
        own = {f"{path}.{key}": x for key, x in module.items() if isinstance(x, mx.array)}
        for key, x in own.items():
            own[key] = x.astype(DTYPES[DTYPE].mlx) if mx.issubdtype(x.dtype, mx.floating) else x
        size += sum(x.nbytes for x in own.values())
        if "scales" in module:
            spec, name = QuantSpec(module.bits, module.group_size), f"{path}.weight"
            weights[name] = dequantized(name, own, spec)
        else:
            weights |= {key: x.astype(mx.float32) for key, x in own.items()}
    return weights, size


def peer_methods(
    wanted: list[str], folder: Path, tokens: mx.array, bits: int, budget: int
) -> Iterator[Method]:
    """Yield what mlx-lm's tools make of a model at about this size."""
    recipe = {3: "mixed_3_4"}.get(bits, "mixed_4_6")
    linear, embeddings = {3: (2, 8), 4: (4, 4)}.get(bits, (4, 8))
    pairs = (bits - 1, bits + 1, 64), (bits, bits + 1, 128)
    dynamic_name = "dynamic_quant {}/{} bits, groups of {}"
    every: dict[str, list[tuple[Any, ...]]] = {  # tool -> variants: name, work and its arguments
        "mixed": [(recipe, mixed, bits, recipe)],
        "dynamic_quant": [
            (dynamic_name.format(*pair), dynamic, tokens, budget, *pair) for pair in pairs
        ],
        "awq": [("awq (with a configuration of ours)", awq, tokens, bits)],
        "gptq": [
            (f"gptq {linear} bits, embeddings {embeddings}", gptq, tokens, linear, embeddings)
        ],
        "dwq": [(f"dwq, rate {rate:g}", dwq, tokens, bits, rate) for rate in (1e-5, 1e-4)],
    }
    for name, work, *rest in (
        variant for tool in TOOLS if tool in wanted for variant in every[tool]
    ):
        yield f"mlx-lm {name}", partial(work, folder, *rest)


def mixed(folder: Path, bits: int, recipe: str) -> Result:
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import quantize_model

    model, config = loaded(folder)
    predicate: Any = mixed_quant_predicate_builder(recipe, model)
    quantize_model(model, config, 64, bits, quant_predicate=predicate)
    return stored(model)


def dynamic(folder: Path, tokens: mx.array, budget: int, low: int, high: int, group: int) -> Result:
    """Take its sensitivities, and the lowest threshold whose bytes fit."""
    from mlx_lm.quant.dynamic_quant import estimate_sensitivities

    found = estimate_sensitivities(loaded(folder)[0], tokens[:8], low, group, high, group)
    names = [name for name, _ in sorted(found, key=lambda entry: -entry[1])]
    best: Result | None = None
    for count in range(len(names) + 1):
        trial, many = loaded(folder)[0], set(names[:count])

        def spec(path: str, module: nn.Module, many: set[str] = many) -> Any:
            own = {"bits": high if path in many else low, "group_size": group}
            return hasattr(module, "to_quantized") and own

        nn.quantize(trial, group, low, class_predicate=spec)
        result = stored(trial)
        if result[1] > budget:
            break
        best = result
    if best is None:
        raise ValueError(f"{low} bits are larger than the size")
    return best


class Adapter:
    """A model as awq_quantize walks through it: with `.model[embed]`, `.layers` and items."""

    def __init__(self, own: Any) -> None:
        self.own, self.model, self.layers = own, own.transformer, own.layers

    def __contains__(self, key: str) -> bool:
        return key in self.own

    def __getitem__(self, key: str) -> Any:
        return self.own[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.own[key] = value


def awq(folder: Path, tokens: mx.array, bits: int) -> Result:
    """Run it with a configuration and an adapter of ours, as it has none for OpenELM."""
    from mlx_lm.quant import awq

    scale: Any = awq.ScaleConfig  # it wants names of modules; its types say modules
    attention = scale(block="attn", prev="attn_norm", layers=["qkv_proj"], kwargs=["mask"])
    scales = [attention, scale(block="ffn", prev="ffn_norm", layers=["proj_1"])]
    config = awq.AWQConfig(
        embed="token_embeddings", lm_head="lm_head", no_clip=["qkv_proj"], scale_configs=scales
    )
    model, _ = loaded(folder)
    sizes = {"bits": bits, "embed_bits": bits, "group_size": 64, "embed_group_size": 64}
    awq.awq_quantize(Adapter(model), tokens[:8], config, n_grid=8, **sizes)
    return stored(model)


def gptq(folder: Path, tokens: mx.array, linear: int, embeddings: int) -> Result:
    """Quantize the linear layers by it; it rounds the embeddings to nearest."""
    from mlx_lm.quant.gptq import gptq_quantize

    model, _ = gptq_quantize(loaded(folder)[0], tokens[:64], linear, 64, embeddings, 64)
    return stored(model)


def dwq(folder: Path, tokens: mx.array, bits: int, rate: float) -> Result:
    """Distil scales and biases in one pass over the calibration text."""
    from mlx_lm.quant.dwq import dwq_quantize

    from openelm_mlx.device import optimizers

    exact, model = loaded(folder)[0], loaded(folder)[0]
    nn.quantize(model, 64, bits)
    texts: Any = tokens.tolist()
    rows = [(row, 0) for row in texts]
    dwq_quantize(
        model,
        lambda batch, index, split: exact(batch),
        optimizers.Adam(rate, bias_correction=True),
        *(rows[4:], rows[:4]),
        batch_size=4,
        max_seq_length=tokens.shape[1],
        seed=17,
        dtype=mx.float32,
    )
    return stored(model)
