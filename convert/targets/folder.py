"""A model folder for MLX, or for Hugging Face: safetensors, configuration, tokenizer, record.

Weights are written one tensor at a time: the header is known beforehand, so memory has no more
than a tensor.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from openelm_mlx.convert.opening import OpenedModel
from openelm_mlx.convert.options import ConvertOptions, Progress
from openelm_mlx.convert.quantize.plan import Quantization, given_plan, plan_quantization
from openelm_mlx.convert.quantize.rounding import layout
from openelm_mlx.convert.record import (
    KEPT,
    MERGED,
    ConversionReport,
    conversion_record,
    licence_of,
    model_card,
)
from openelm_mlx.convert.sources.adapters import ADAPTER_FOLDER, check_kept, write_kept
from openelm_mlx.convert.targets import Target
from openelm_mlx.convert.targets.checks import UNFINISHED_CONFIG, write_record
from openelm_mlx.convert.tokenizers import TokenizerModel, build_tokenizer_json, tokenizer_config
from openelm_mlx.device import mx
from openelm_mlx.dtypes import DTYPES
from openelm_mlx.engine.loading import chat_sampling, generation_config
from openelm_mlx.engine.prompts import CHAT_TEMPLATE, TEMPLATE
from openelm_mlx.files import INDEX, WEIGHTS, TensorInfo, write_json
from openelm_mlx.model.config import EMBEDDINGS, GENERATION_CONFIG, OpenELMConfig
from openelm_mlx.quantization import KEYS, Plan, config_entry, planned, stem_of

SHARD_BYTES = 5 << 30


class FolderTarget(Target):
    """The folder that a conversion writes with --to mlx or --to hf."""

    keeps_record = True

    def __init__(
        self, opened: OpenedModel, tensors: Mapping[str, TensorInfo], options: ConvertOptions
    ) -> None:
        """`tensors` are those of the model in the types to be written, not yet quantized."""
        self.opened, self.options, self.tensors = opened, options, tensors
        self.dtype = tensors[f"{EMBEDDINGS}.weight"].dtype
        self.sampling = sampling_defaults(options.source, opened.trimmed)
        self.licence = licence_of(opened.source, options)
        self.tokenizer_files = tokenizer_files(opened.tokenizer)
        if opened.adapted is not None and opened.adapted.form is not None:
            measured = options.target_bpw is not None
            quantized = measured or given_plan(opened, options)[EMBEDDINGS] is not None
            check_kept(opened.adapted, quantized)

    def plan(self, progress: Progress | None) -> Quantization:
        return plan_quantization(self.opened, self.dtype, self.options, progress)

    def nbytes(self, plan: Plan | None = None) -> int:
        if plan is None and self.options.target_bpw is not None:
            return int(self.options.target_bpw * self.opened.trimmed.num_parameters / 8)
        plan = given_plan(self.opened, self.options) if plan is None else plan
        return sum(info.nbytes for info in self._layout(plan).values())

    def types(self, plan: Plan) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for name, info in self.tensors.items():
            spec = planned(plan, name)
            if spec is None or spec.mode == "affine":  # the others' scales have 8 bits
                found.setdefault(info.dtype, []).append(stem_of(name))
        return found

    def rounds(self, plan: Plan) -> set[str]:
        return {stem for stem, spec in plan.items() if spec is not None}

    def write(self, folder: Path, plan: Plan, arrays: Iterable[tuple[str, mx.array]]) -> Path:
        made_for = "pt" if self.options.target_format == "hf" else "mlx"
        write_weights(folder, self._layout(plan), arrays, made_for)
        instruct, licences = self.options.is_instruct, self.licence.files
        write_beside(folder, self.tokenizer_files, instruct, self.sampling, licences)
        config = self.opened.trimmed
        raw = config.to_hf_dict()
        if (quantization := config_entry(plan)) is not None:
            raw |= dict.fromkeys(KEYS, quantization)
        write_json(folder / UNFINISHED_CONFIG, raw)
        if (adapted := self.opened.adapted) is not None and adapted.form is not None:
            write_kept(folder / ADAPTER_FOLDER, adapted, config)
        return folder

    def write_record(
        self, folder: Path, report: ConversionReport, hashes: Mapping[str, str]
    ) -> None:
        adapted = self.opened.adapted
        kept = None if adapted is None else KEPT if adapted.form else MERGED
        record = conversion_record(self.options, report, self.licence, kept, hashes)
        card = model_card(record, report, self.options.is_instruct)
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_record(folder, record)

    def _layout(self, plan: Plan) -> dict[str, TensorInfo]:
        """Return every tensor to write, in order."""
        found: dict[str, TensorInfo] = {}
        for name, info in self.tensors.items():
            found |= layout(name, info, planned(plan, name))
        return found


def sampling_defaults(source: Path, config: OpenELMConfig) -> dict[str, Any]:
    """Return the content of generation_config.json: that of the source's own, with all BOS and EOS
    ids.

    Raises `ConfigError` for a file that could not be loaded again.
    """
    folder = source if source.is_dir() else source.parent
    chat_sampling(folder)
    eos = config.with_eos_of(folder).written_eos
    _, stated = generation_config(folder)
    return {**stated, "bos_token_id": config.bos_token_id, "eos_token_id": eos}


def write_beside(
    folder: Path,
    tokenizer: Mapping[str, bytes],
    instruct: bool,
    sampling: Mapping[str, Any],
    licences: Iterable[Path],
) -> None:
    """Write what stands beside the weights: the files of `tokenizer_files`, the chat template of an
    Instruct model, `sampling_defaults`, and copies of licences.
    """
    for name, content in tokenizer.items():
        (folder / name).write_bytes(content)
    if instruct:
        (folder / TEMPLATE).write_text(CHAT_TEMPLATE, encoding="utf-8")
    write_json(folder / GENERATION_CONFIG, dict(sampling))
    for path in licences:
        shutil.copyfile(path, folder / path.name)


def tokenizer_files(tokenizer: TokenizerModel) -> dict[str, bytes]:
    """Return tokenizer.model, tokenizer.json and tokenizer_config.json by name.

    Raises `TokenizerError` for a tokenizer that other tools would read differently.
    """
    content = build_tokenizer_json(tokenizer)
    compact = json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"
    settings = json.dumps(tokenizer_config(tokenizer), indent=2, ensure_ascii=False) + "\n"
    return {
        "tokenizer.model": tokenizer.data,
        "tokenizer.json": compact.encode(),
        "tokenizer_config.json": settings.encode(),
    }


def write_weights(
    folder: Path,
    tensors: Mapping[str, TensorInfo],
    arrays: Iterable[tuple[str, mx.array]],
    made_for: str = "mlx",
    limit: int = SHARD_BYTES,
) -> list[str]:
    """Write `arrays`, which come in the order of `tensors`, and return the names of the files.

    They become model.safetensors, or shards of at most `limit` bytes with an index.
    """
    shards, names = split(tensors, limit), [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{n + 1:05d}-of-{len(shards):05d}.safetensors" for n in range(len(shards))]
    stream = iter(arrays)
    for file_name, shard in zip(names, shards, strict=True):
        with open(folder / file_name, "wb") as file:
            file.write(header(shard, made_for))
            for expected, info in shard.items():
                name, array = next(stream)
                data = to_bytes(array)
                if name != expected or len(data) != info.nbytes:
                    raise RuntimeError(
                        f"bug: planned {expected} of {info.nbytes} bytes, got {name} of {len(data)}"
                    )
                file.write(data)
    if len(shards) > 1:
        places = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        total = sum(info.nbytes for info in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        write_json(folder / INDEX, index)
    return names


def split(tensors: Mapping[str, TensorInfo], limit: int) -> list[dict[str, TensorInfo]]:
    """Cut `tensors` into shards, in order. A tensor above `limit` gets a shard of its own."""
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, info in tensors.items():
        if shards[-1] and size + info.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = info
        size += info.nbytes
    return shards


def header(tensors: Mapping[str, TensorInfo], made_for: str) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": made_for}}
    start = 0
    for name, info in tensors.items():
        end = start + info.nbytes
        code = DTYPES[info.dtype].safetensors
        entries[name] = {"dtype": code, "shape": list(info.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format wants data aligned to 8 bytes
    return len(text).to_bytes(8, "little") + text


def to_bytes(array: mx.array) -> memoryview:
    """Return the array's elements in C order, little-endian, as safetensors stores them."""
    plain = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return np.ascontiguousarray(np.array(plain)).data.cast("B") if plain.size else memoryview(b"")
