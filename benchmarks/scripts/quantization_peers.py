"""mlx-lm's quantization tools on OpenELM, through their Python functions: the command lines fetch
texts from the network.

Each tool gives variants: a name, and the work that returns float32 weights and the bytes they are
stored in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from openelm_mlx.device import mx, nn

Result = tuple[dict[str, mx.array], int]
Variant = tuple[str, Callable[[], Result]]
SIDE = mx.float16  # scales, biases, norms and whole matrices, as everywhere in the comparison


def loaded(folder: Path) -> tuple[Any, dict[str, Any]]:
    from mlx_lm.utils import load_model

    model, config = load_model(folder)
    return model, config


def stored(model: nn.Module) -> Result:
    """The weights of an mlx-lm model as they would be stored with scales in float16."""
    weights: dict[str, mx.array] = {}
    size = 0
    for path, module in model.named_modules():
        own = {key: value for key, value in module.items() if isinstance(value, mx.array)}
        sides = {
            key: value.astype(SIDE)
            for key, value in own.items()
            if mx.issubdtype(value.dtype, mx.floating)
        }
        size += sum(sides.get(key, value).nbytes for key, value in own.items())
        if "scales" in own:
            weights[f"{path}.weight"] = mx.dequantize(
                own["weight"],
                sides["scales"].astype(mx.float32),
                sides["biases"].astype(mx.float32),
                group_size=module.group_size,
                bits=module.bits,
            )
        else:
            weights |= {f"{path}.{key}": value.astype(mx.float32) for key, value in sides.items()}
    return weights, size


def mixed(folder: Path, tokens: mx.array, bits: int, budget: int) -> Iterator[Variant]:
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.utils import quantize_model

    name = {3: "mixed_3_4", 4: "mixed_4_6"}.get(bits, "mixed_4_6")

    def work() -> Result:
        model, config = loaded(folder)
        predicate: Any = mixed_quant_predicate_builder(
            name, model
        )  # takes the configuration too; its types do not say so
        quantize_model(model, config, 64, bits, quant_predicate=predicate)
        return stored(model)

    yield f"mlx-lm {name}", work


def dynamic(folder: Path, tokens: mx.array, bits: int, budget: int) -> Iterator[Variant]:
    """Its sensitivities; the threshold is the lowest whose bytes fit."""
    for low, high, group in ((bits - 1, bits + 1, 64), (bits, bits + 1, 128)):

        def work(low: int = low, high: int = high, group: int = group) -> Result:
            from mlx_lm.quant.dynamic_quant import estimate_sensitivities

            model, _ = loaded(folder)
            found = estimate_sensitivities(model, tokens[:8], low, group, high, group)
            best: Result | None = None
            for count in range(len(found) + 1):
                chosen = {name for name, _ in sorted(found, key=lambda entry: -entry[1])[:count]}
                trial, _ = loaded(folder)

                def form(path: str, module: nn.Module, chosen: set[str] = chosen) -> Any:
                    width = high if path in chosen else low
                    return hasattr(module, "to_quantized") and {"bits": width, "group_size": group}

                nn.quantize(trial, group, low, class_predicate=form)
                result = stored(trial)
                if result[1] > budget:
                    break
                best = result
            if best is None:
                raise ValueError(f"{low} bits are larger than the size")
            return best

        yield f"mlx-lm dynamic_quant {low}/{high} bits, groups of {group}", work


def awq(folder: Path, tokens: mx.array, bits: int, budget: int) -> Iterator[Variant]:
    """Not for OpenELM as it comes; with a configuration for it and an object that answers as its
    code asks.
    """

    def work() -> Result:
        from mlx_lm.quant import awq

        scale: Any = awq.ScaleConfig  # wants names of modules; its types say modules
        model, _ = loaded(folder)
        config = awq.AWQConfig(
            embed="token_embeddings",
            lm_head="lm_head",
            no_clip=["qkv_proj"],
            scale_configs=[
                scale(block="attn", prev="attn_norm", layers=["qkv_proj"], kwargs=["mask"]),
                scale(block="ffn", prev="ffn_norm", layers=["proj_1"]),
            ],
        )
        awq.awq_quantize(
            Shim(model),
            tokens[:8],
            config,
            group_size=64,
            bits=bits,
            embed_group_size=64,
            embed_bits=bits,
            n_grid=8,
        )
        return stored(model)

    yield "mlx-lm awq (with a configuration of ours)", work


class Shim:
    """An OpenELM model that awq_quantize can walk: it wants `.model[embed]`, `.layers` and item
    access.
    """

    def __init__(self, model: Any) -> None:
        self.whole, self.model, self.layers = model, model.transformer, model.layers

    def __contains__(self, key: str) -> bool:
        return key in self.whole

    def __getitem__(self, key: str) -> Any:
        return self.whole[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.whole[key] = value


def gptq(folder: Path, tokens: mx.array, bits: int, budget: int) -> Iterator[Variant]:
    """2, 4 or 8 bits for linear layers; the embeddings, which it does not learn, take a fallback of
    their own.
    """
    linear, fallback = {3: (2, 8), 4: (4, 4), 5: (4, 8)}.get(bits, (4, 8))

    def work() -> Result:
        from mlx_lm.quant.gptq import gptq_quantize

        model, _ = loaded(folder)
        model, _ = gptq_quantize(model, tokens[:64], linear, 64, fallback, 64)
        return stored(model)

    yield f"mlx-lm gptq {linear} bits, embeddings {fallback}", work


def dwq(folder: Path, tokens: mx.array, bits: int, budget: int) -> Iterator[Variant]:
    """Uniform quantization with scales and biases distilled, one pass over the calibration text, at
    two rates.
    """
    for rate in (1e-5, 1e-4):

        def work(rate: float = rate) -> Result:
            from mlx_lm.quant.dwq import dwq_quantize

            from openelm_mlx.device import optimizers

            exact, _ = loaded(folder)
            model, _ = loaded(folder)
            nn.quantize(model, 64, bits)
            texts: Any = tokens.tolist()
            rows = [(row, 0) for row in texts]
            optimizer = optimizers.Adam(rate, bias_correction=True)
            dwq_quantize(
                model,
                lambda batch, index, split: exact(batch),
                optimizer,
                rows[4:],
                rows[:4],
                batch_size=4,
                max_seq_length=len(rows[0][0]),
                seed=17,
                dtype=mx.float32,
            )
            return stored(model)

        yield f"mlx-lm dwq, rate {rate:g}", work


TOOLS = {"mixed": mixed, "dynamic_quant": dynamic, "awq": awq, "gptq": gptq, "dwq": dwq}
