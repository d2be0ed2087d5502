"""The map of a conversion: source -> configuration -> plan -> folder beside the target -> rename."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from openelm_mlx.convert.licence import licence_of
from openelm_mlx.convert.opening import OpenedModel, open_model
from openelm_mlx.convert.options import ConvertOptions
from openelm_mlx.convert.quantize.plan import memory_needed, plan_quantization
from openelm_mlx.convert.quantize.rounding import layout, quantized
from openelm_mlx.convert.record import KEPT, MERGED, SourceHash, conversion_record
from openelm_mlx.convert.sources import TensorSource
from openelm_mlx.convert.sources.adapters import ADAPTER_FOLDER, write_adapter
from openelm_mlx.convert.staging import check_inputs, check_target, staged
from openelm_mlx.convert.targets.folder import (
    CHAT_TEMPLATE,
    sampling_defaults,
    write_record,
    write_side_files,
)
from openelm_mlx.convert.targets.writer import write_weights
from openelm_mlx.convert.verify import check_bound, verification_text, verify
from openelm_mlx.device import mx
from openelm_mlx.errors import CheckpointError, ConversionError, OptionError
from openelm_mlx.fields import shown
from openelm_mlx.files import TensorInfo
from openelm_mlx.model.config import OpenELMConfig, expected_tensors
from openelm_mlx.quantization import Plan, QuantSpec, matrices

Progress = Callable[
    [int, int, str], None
]  # tensors done, tensors in all, name of the one just written
CHUNK_BYTES = (
    16 << 20
)  # rows are quantized this many source bytes at a time: small enough for caches and for reused memory
VOCABULARY_TENSORS = ("transformer.token_embeddings.weight", "lm_head.weight")


@dataclass(frozen=True)
class ConversionReport:
    """The outcome of a conversion, or of its dry run: `parameters`, bytes of the weights in the
    source and written, bits per parameter.

    `forms` gives each matrix's quantization, None where it stays whole; `dropped_rows` are
    embeddings without a piece of the tokenizer. `measured` holds what was found while forms were
    chosen and rounding was learned, `verification` the losses against the source where they were
    asked for: KL divergence in nats, perplexities, agreement.
    """

    target: Path
    config: OpenELMConfig
    parameters: int
    source_bytes: int
    written_bytes: int
    bits_per_weight: float
    dropped_rows: int
    forms: Plan = field(default_factory=dict)
    memory_bytes: int = 0  # an estimate of the peak, beside the interpreter
    measured: Mapping[str, Any] = field(default_factory=dict)
    verification: Mapping[str, float] | None = None


def convert(options: ConvertOptions, progress: Progress | None = None) -> ConversionReport:
    """Convert `options.source` into the folder `options.target`, which appears only when it is
    complete.

    Raises `ConversionError`, `CheckpointError`, `ConfigError`, `TokenizerError` or `OptionError`,
    and leaves nothing behind then or when interrupted.
    """
    if not isinstance(options, ConvertOptions):
        raise OptionError(
            f"options is {shown(options)}; allowed is one made by ConvertOptions(source, target)"
        )
    check_target(options)
    check_inputs(options)
    opened = open_model(options)  # 1. what is there, 2. what model it makes
    if opened.source.instruct and options.instruct is None:
        options = replace(options, instruct=True)
    source, trimmed = opened.source, opened.trimmed
    judged_on = (
        verification_text(opened, options.verify_text) if options.verifies else []
    )  # a bad text is found here
    if options.target_format == "gguf":
        return convert_to_gguf(opened, options, judged_on, progress)
    sampling = sampling_defaults(options.source, trimmed)
    first = "transformer.token_embeddings.weight"
    dtype = target_dtype(first, source.tensors[first].dtype, trimmed, options)
    planning = plan_quantization(opened, dtype, options, progress)  # 3. what will be written
    forms = planning.plan
    plan = make_plan(source, trimmed, forms, options)
    report = make_report(
        source, opened.config, trimmed, sum(info.nbytes for info in plan.values()), options
    )
    report = replace(
        report,
        forms=forms,
        measured=planning.measured,
        memory_bytes=memory_needed(trimmed, options),
    )
    if options.dry_run:
        return report
    record = conversion_record(
        options,
        forms,
        dtype,
        report.parameters,
        report.written_bytes,
        report.dropped_rows,
        planning.measured,
    )
    licence = licence_of(opened.source, options)
    if licence.entries:
        record["license"] = licence.entries
    if opened.adapters is not None:
        record["adapter"] = MERGED if opened.adapters.merge else KEPT
    hashes = SourceHash(source.files)
    try:
        with staged(options) as folder:  # 4. write beside, then rename
            arrays = stream(opened, forms, options, progress, planning.learned)
            write_weights(folder, plan, arrays, options.target_format)
            write_side_files(
                folder,
                trimmed,
                opened.tokenizer,
                forms,
                record,
                options.is_instruct,
                licence,
                sampling,
            )
            write_kept_adapter(folder, opened, forms)
            if options.verifies:  # 5. prove it
                report = replace(report, verification=verified(folder, opened, judged_on, options))
                record["verification"] = dict(report.verification or {})
                record["verification_text"] = (
                    None if options.verify_text is None else options.verify_text.name
                )
            record["source_sha256"] = hashes.result()
            write_record(folder, record, forms, options.is_instruct)
    finally:
        hashes.stop()
    return report


def verified(
    path: Path, opened: OpenedModel, batches: list[mx.array], options: ConvertOptions
) -> dict[str, float]:
    """The losses of what was written to `path`. Raises `ConversionError` above `--max-kl`."""
    losses = verify(path, opened, batches)
    check_bound(losses, options.max_kl, options.target_format)
    return losses


def convert_to_gguf(
    opened: OpenedModel,
    options: ConvertOptions,
    judged_on: list[mx.array],
    progress: Progress | None,
) -> ConversionReport:
    """Steps 3 to 5 for a GGUF file: whole tensors in, llama.cpp's types out. The format has no
    place for the losses.
    """
    from openelm_mlx.convert.targets.gguf import check_gguf, gguf_layout, gguf_type, write_gguf

    forms: Plan = dict.fromkeys(matrices(expected_tensors(opened.trimmed)))
    plan = make_plan(opened.source, opened.trimmed, forms, options)
    dtype = plan["transformer.token_embeddings.weight"].dtype
    kind = gguf_type(dtype, options.bits, options.group_size, options.mode)
    check_gguf(opened.trimmed, kind == "Q8_0")
    written = sum(tensor.nbytes for tensor in gguf_layout(opened.trimmed, kind))
    report = make_report(opened.source, opened.config, opened.trimmed, written, options)
    report = replace(report, memory_bytes=memory_needed(opened.trimmed, options))
    if options.dry_run:
        return report
    with staged(options) as folder:
        arrays = stream(opened, forms, options, progress)
        template = CHAT_TEMPLATE if options.is_instruct else None
        path, name = folder / options.target.name, options.target.stem
        terms = licence_of(opened.source, options).without_files
        write_gguf(path, name, opened.trimmed, opened.tokenizer, kind, template, arrays, terms)
        return replace(
            report,
            verification=verified(path, opened, judged_on, options) if options.verifies else None,
        )


def make_plan(
    source: TensorSource,
    config: OpenELMConfig,
    forms: Plan,
    options: ConvertOptions,
) -> dict[str, TensorInfo]:
    """Every tensor to write with type and shape, in order; refuses before any work what cannot be
    done.
    """
    shapes = expected_tensors(config)
    plan: dict[str, TensorInfo] = {}
    for name, shape in shapes.items():
        dtype = target_dtype(name, source.tensors[name].dtype, config, options)
        plan |= layout(name, TensorInfo(dtype, shape), forms.get(name.removesuffix(".weight")))
    return plan


def target_dtype(name: str, stored: str, config: OpenELMConfig, options: ConvertOptions) -> str:
    if stored not in ("float64", "float32", "float16", "bfloat16"):
        raise CheckpointError(f"{name} holds {stored}; weights must be floating-point numbers")
    dtype = options.dtype or stored.replace("float64", "float32")
    if (
        dtype == "float16" and config.model_dim >= 3072 and options.target_format != "gguf"
    ):  # llama.cpp computes in float32
        raise ConversionError(
            "OpenELM-3B needs a wider range than float16 has; use --dtype bfloat16 or float32"
        )
    return dtype


def stream(
    opened: OpenedModel,
    forms: Plan,
    options: ConvertOptions,
    progress: Progress | None,
    learned: Mapping[str, Mapping[str, mx.array]] | None = None,
) -> Iterator[tuple[str, mx.array]]:
    """The planned arrays one after another; of the source at most one tensor is in memory, of a
    matrix to be quantized only some of its rows.
    """
    shapes, stored = (
        expected_tensors(opened.trimmed),
        opened.source.forms if options.dtype is None else {},
    )
    for number, (name, shape) in enumerate(shapes.items(), start=1):
        stem = name.removesuffix(".weight")
        form = forms.get(stem)
        if learned and name in learned:
            yield from learned[name].items()
        elif form is not None and form == stored.get(stem):
            yield from opened.packed(name).items()
        elif form is not None:
            yield from quantized_by_rows(opened, name, shape, form, options).items()
        else:
            array = opened.source.load(name)
            yield name, final_array(opened.source, name, array, shape[0], options)
        if progress is not None:
            progress(number, len(shapes), name)


def quantized_by_rows(
    opened: OpenedModel, name: str, shape: tuple[int, ...], form: QuantSpec, options: ConvertOptions
) -> dict[str, mx.array]:
    """The arrays of a quantized matrix. Its groups lie within rows, so a few rows at a time give
    the same.
    """
    step = max(1, CHUNK_BYTES // (4 * shape[1]))
    parts: list[dict[str, mx.array]] = []
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        rows = opened.source.rows(name, start, stop)
        rows = final_array(opened.source, name, rows, stop - start, options)
        parts.append(quantized(name, rows, form))
        mx.async_eval(*parts[-1].values())  # while these are rounded, the next are read
        del rows
    return {key: mx.concatenate([part[key] for part in parts]) for key in parts[0]}


def final_array(
    source: TensorSource,
    name: str,
    array: mx.array,
    rows: int,
    options: ConvertOptions,
) -> mx.array:
    """What was read as `name`, checked, without padding rows and in the type asked for."""
    if name in VOCABULARY_TENSORS and array.shape[0] > rows:
        array = array[:rows]
    if not all_finite(array):
        raise CheckpointError(
            f"{source.path}: {name} holds NaN or infinite weights; the checkpoint is damaged"
        )
    if options.dtype is not None:
        array = array.astype(getattr(mx, options.dtype))
        if options.dtype == "float16" and not all_finite(
            array
        ):  # the other types have float32's range
            raise ConversionError(
                f"{name} overflows {options.dtype}; use --dtype bfloat16 or float32"
            )
    return array


def all_finite(array: mx.array) -> bool:
    """NaN and infinities survive minimum and maximum, which take a quarter of the time of a look at
    every element.

    By numpy where it knows the type: on this thread, while MLX's rounds the rows before.
    """
    if array.size == 0:
        return True
    if array.dtype in (mx.float32, mx.float16):
        plain = np.array(array, copy=False)
        return bool(np.isfinite(plain.min()) and np.isfinite(plain.max()))
    return bool(mx.isfinite(mx.stack([array.min(), array.max()])).all().item())


def make_report(
    source: TensorSource,
    config: OpenELMConfig,
    trimmed: OpenELMConfig,
    written: int,
    options: ConvertOptions,
) -> ConversionReport:
    return ConversionReport(
        target=options.target,
        config=trimmed,
        parameters=trimmed.num_parameters,
        source_bytes=sum(info.nbytes for info in source.tensors.values()),
        written_bytes=written,
        bits_per_weight=8 * written / trimmed.num_parameters,
        dropped_rows=config.vocab_size - trimmed.vocab_size,
    )


def write_kept_adapter(folder: Path, opened: OpenedModel, forms: Plan) -> None:
    """The folder `adapter`, where the adapter was not merged into the weights."""
    if opened.adapters is not None and not opened.adapters.merge:
        quantized_embedding = forms["transformer.token_embeddings"] is not None
        config = opened.trimmed
        write_adapter(
            folder / ADAPTER_FOLDER,
            opened.adapters,
            config.vocab_size,
            config.num_transformer_layers,
            quantized_embedding,
        )
