"""Files of adapters: the folders of mlx-lm and of Hugging Face's PEFT, read and written.

Both have an adapter_config.json beside one safetensors file. mlx-lm (mlx_lm/tuner) stores lora_a
[columns, rank] and lora_b [rank, rows] of W [rows, columns], and `m` [rows] of DoRA; of the
embedding, lora_a [rows, rank] and lora_b [rank, columns]. A head that is tied to it is adapted too.
One rank, one scale and one kind hold for all layers. PEFT's form is in `peft`.

The fingerprint of the base is in the metadata of the safetensors file, which both tools skip, and
chat_template.jinja says that the adapter was trained to converse.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from openelm_mlx.device import mx
from openelm_mlx.dtypes import FLOATS
from openelm_mlx.engine.prompts import CHAT_TEMPLATE, TEMPLATE
from openelm_mlx.errors import CheckpointError, ConversionError, naming
from openelm_mlx.files import name_for_mlx, read_header, read_json, write_json
from openelm_mlx.model import peft
from openelm_mlx.model.adapters import Adapter, LowRank
from openelm_mlx.model.config import EMBEDDINGS, HEAD, MAX_PADDING, OpenELMConfig
from openelm_mlx.model.fingerprint import numbers_of
from openelm_mlx.model.peft import SETTINGS

WEIGHTS = "adapters.safetensors"
WEIGHT_FILES = (WEIGHTS, peft.WEIGHTS)
BASE = "openelm_base"  # the key of the fingerprint
LEAVES = ("lora_a", "lora_b", "m")


def read_adapter(folder: Path, config: OpenELMConfig) -> Adapter:
    """Return the adapter in a folder of mlx-lm's or PEFT's, or in a checkpoint of CoreNet's, for a
    model of `config`.

    Raises `ConversionError`, `CheckpointError` or `ConfigError` for one that is damaged, that does
    more than LoRA and DoRA do, or that does not fit the model.
    """
    if not (folder / SETTINGS).is_file():
        from openelm_mlx.convert.sources.corenet_adapters import read_checkpoint

        return read_checkpoint(folder, config)
    raw = read_json(folder / SETTINGS)
    if "peft_type" in raw:
        settings = peft.Settings.of(folder, raw)
        arrays, base = read_arrays(peft.weights_of(folder))
        parts = peft.read_parts(folder, settings, arrays)
    elif "fine_tune_type" in raw or "lora_parameters" in raw:
        scale, dora = settings_of(folder, raw)
        arrays, base = read_arrays(folder / WEIGHTS)
        parts = read_parts(folder, scale, dora, arrays)
        if config.share_input_output_layers and EMBEDDINGS in parts:
            parts[HEAD] = parts[EMBEDDINGS]
    else:
        raise ConversionError(
            f"{folder}: {SETTINGS} has neither peft_type, as PEFT's has, nor lora_parameters, as "
            "mlx-lm's has; give the folder of an adapter"
        )
    if not parts:
        raise ConversionError(f"{folder} adapts nothing: its file has no tensors")
    instruct = (folder / TEMPLATE).is_file()
    adapter = Adapter(folder.absolute().name, with_rows(parts, config.vocab_size), base, instruct)
    with naming(folder):
        adapter.check(config)
    return adapter


def read_arrays(path: Path) -> tuple[dict[str, mx.array], str | None]:
    """Return the tensors of a safetensors file in float32, and the fingerprint in its metadata."""
    for name, place in read_header(path).items():
        if place.info.dtype not in FLOATS:
            raise CheckpointError(
                f"{path}: {name!r:.100} is {place.info.dtype}; allowed: {', '.join(FLOATS)}"
            )
    try:
        loaded: Any = mx.load(name_for_mlx(path), format="safetensors", return_metadata=True)
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or cut short: {error}") from None
    arrays, metadata = loaded
    if (base := metadata.get(BASE)) is not None:
        try:
            numbers_of(base)
        except ValueError as error:
            raise CheckpointError(f"{path}: {BASE} in its metadata: {error}") from None
    return {name: array.astype(mx.float32) for name, array in arrays.items()}, base


def settings_of(folder: Path, raw: Mapping[str, Any]) -> tuple[float, bool]:
    """Return the scale of an adapter of mlx-lm's, and whether it is DoRA."""
    kind, parameters = raw.get("fine_tune_type", "lora"), raw.get("lora_parameters")
    if kind not in ("lora", "dora"):
        raise ConversionError(
            f"{folder}: fine_tune_type is {str(kind):.40}; only lora and dora are adapters here"
        )
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) < 1e9:
        raise ConversionError(f"{folder}: {SETTINGS} has no number as lora_parameters.scale")
    return float(scale), kind == "dora"


def read_parts(
    folder: Path, scale: float, dora: bool, arrays: Mapping[str, mx.array]
) -> dict[str, LowRank]:
    """Return the parts of an adapter of mlx-lm's, by stem."""
    found: dict[str, dict[str, mx.array]] = {}
    for name, array in arrays.items():
        stem, _, leaf = name.rpartition(".")
        if leaf not in LEAVES:
            raise ConversionError(
                f"{folder} contains {name!r:.100}, which is no part of LoRA or DoRA; only "
                f"{', '.join(LEAVES)} are read"
            )
        found.setdefault(stem, {})[leaf] = array
    wanted = LEAVES if dora else LEAVES[:2]
    parts = {}
    for stem, leaves in found.items():
        peft.check_complete(folder, stem, leaves, wanted)
        first, second = leaves["lora_a"], leaves["lora_b"]
        a, b = (second, first) if stem == EMBEDDINGS else (first.T, second.T)
        parts[stem] = LowRank(a, b, scale, leaves.get("m"))
    return parts


def with_rows(parts: Mapping[str, LowRank], rows: int) -> dict[str, LowRank]:
    """Return the parts for a vocabulary of `rows`: padding of the embedding and the head, which
    stands for no token, is cut off or added.
    """
    fitted: dict[LowRank, LowRank] = {}  # so that two sides that are one stay one
    result = dict(parts)
    for stem in {EMBEDDINGS, HEAD} & parts.keys():
        part = parts[stem]
        more, m = rows - part.b.shape[0], part.magnitude
        unknown = m is not None and (more > 0 or m.ndim == 2)  # lengths that padding has or changes
        if abs(more) > MAX_PADDING or more == 0 or unknown:
            continue
        if part not in fitted:
            b = mx.pad(part.b, [(0, max(0, more)), (0, 0)])[:rows]
            fitted[part] = LowRank(part.a, b, part.scale, None if m is None else m[:rows])
        result[stem] = fitted[part]
    return result


def write_adapter(
    folder: Path, adapter: Adapter, form: str, config: OpenELMConfig, base_name: str | None = None
) -> None:
    """Write a folder in the form `mlx-lm`, for mlx_lm.load(..., adapter_path=), or `peft`.

    `config` is that of the base, and `base_name` its name if it has one. Raises `ConversionError`
    for what the form cannot express.
    """
    parts = dict(adapter.parts)
    head = parts.get(HEAD)
    if len({part.magnitude is None for part in parts.values()}) > 1:
        raise ConversionError(
            f"{adapter.name} is LoRA in some layers and DoRA in others, which no adapter folder "
            "can be; merge it into its base"
        )
    if config.share_input_output_layers and head is not (
        parts.get(EMBEDDINGS) if form == "mlx-lm" else None
    ):
        side = "one side of a tied embedding; mlx-lm adapts both"
        if form == "peft":
            side = "the head of a tied embedding; PEFT adapts the input side only"
        raise ConversionError(
            f"{adapter.name} adapts {side}. Merge it, or convert its base with --adapter-folder "
            "and --adapter keep, which gives the head a matrix of its own"
        )
    check_embedding(adapter, form)
    metadata = {} if adapter.base is None else {BASE: adapter.base}
    if form == "mlx-lm":
        if config.share_input_output_layers:
            parts.pop(HEAD, None)
        settings, arrays = content(parts, config.num_transformer_layers)
        settings |= {} if base_name is None else {"model": base_name}
        name, metadata["format"] = WEIGHTS, "mlx"
    else:
        settings, arrays = peft.content(parts, base_name)
        name, metadata["format"] = peft.WEIGHTS, "pt"
    folder.mkdir(exist_ok=True)
    dtype = shortest(arrays.values())
    stored = {key: mx.contiguous(array.astype(dtype)) for key, array in arrays.items()}
    mx.save_safetensors(name_for_mlx(folder / name), stored, metadata=metadata)
    if adapter.instruct:
        (folder / TEMPLATE).write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_json(folder / SETTINGS, settings)


def shortest(arrays: Collection[mx.array]) -> mx.Dtype:
    """Return the shortest type that holds all the numbers: an adapter keeps that of its file."""

    def exact(dtype: mx.Dtype) -> bool:
        halves = (mx.array_equal(x, x.astype(dtype).astype(mx.float32)).item() for x in arrays)
        return all(halves)

    return next((dtype for dtype in (mx.bfloat16, mx.float16) if exact(dtype)), mx.float32)


def check_embedding(adapter: Adapter, form: str) -> None:
    """Raise `ConversionError` for DoRA of an embedding as another form has it."""
    m = getattr(adapter.parts.get(EMBEDDINGS), "magnitude", None)
    if m is not None and (m.ndim == 2) != (form == "peft"):
        ours, theirs = ("rows", "columns") if form == "peft" else ("columns", "rows")
        raise ConversionError(
            f"{adapter.name} is DoRA on the embedding with lengths of {ours}, and in the form of "
            f"{form} they are those of {theirs}; merge it into its base"
        )


def content(
    parts: Mapping[str, LowRank], layers: int
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Return the settings and the tensors of mlx-lm's form: lower ranks are padded with zeros,
    and scales that differ move into lora_b.
    """
    rank = max(part.rank for part in parts.values())
    scales = {part.scale for part in parts.values()}
    arrays: dict[str, mx.array] = {}
    for stem, part in parts.items():
        missing = rank - part.rank
        a = mx.pad(part.a, [(0, missing), (0, 0)])
        b = mx.pad(part.b, [(0, 0), (0, missing)])
        b = b if len(scales) == 1 else b * part.scale
        first, second = (b, a) if stem == EMBEDDINGS else (a.T, b.T)
        arrays[f"{stem}.lora_a"], arrays[f"{stem}.lora_b"] = first, second
        if part.magnitude is not None:
            arrays[f"{stem}.m"] = part.magnitude
    parameters = {
        "rank": rank,
        "scale": scales.pop() if len(scales) == 1 else 1.0,
        "dropout": 0.0,
        "keys": list(parts),
    }
    dora = any(part.magnitude is not None for part in parts.values())
    settings = {
        "fine_tune_type": "dora" if dora else "lora",
        "num_layers": layers,
        "lora_parameters": parameters,
    }
    return settings, arrays
