"""The map of a conversion: a source goes in, a model folder or GGUF file comes out.

    source -> OpenedModel      opening.py, with a reader from sources/
    model -> Target            targets/: a folder for MLX, or a GGUF file
    target -> plan             quantize/: the spec of every matrix, perhaps with learned weights
    plan -> files              `stream` below: read, check, quantize, write
    files -> the target        verify.py compares them; targets/ renames them when complete

Nothing stands under the target's name before the last step.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from openelm_mlx.convert.activations import activation_text, measure_activations
from openelm_mlx.convert.adapter import convert_adapter
from openelm_mlx.convert.estimate import CHUNK_BYTES, memory_needed, memory_steps, seconds_needed
from openelm_mlx.convert.opening import OpenedModel, open_model
from openelm_mlx.convert.options import ConvertOptions, Progress
from openelm_mlx.convert.quantize import NORM, exact_weights
from openelm_mlx.convert.quantize.plan import Quantization
from openelm_mlx.convert.quantize.rounding import fitted, quantized
from openelm_mlx.convert.record import ConversionReport, SourceHash
from openelm_mlx.convert.sources.adapters import is_adapter
from openelm_mlx.convert.targets import Target, check_target, staged
from openelm_mlx.convert.targets.checks import (
    check_apart,
    check_inputs,
    check_memory,
    check_space,
)
from openelm_mlx.convert.targets.folder import FolderTarget
from openelm_mlx.convert.targets.gguf import GGUFTarget
from openelm_mlx.convert.verify import check_bound, verification_text, verify
from openelm_mlx.device import mx
from openelm_mlx.dtypes import DTYPES
from openelm_mlx.errors import ConversionError, OptionError
from openelm_mlx.fields import shown
from openelm_mlx.files import TensorInfo
from openelm_mlx.model.checkpoint import not_finite
from openelm_mlx.model.config import OpenELMConfig
from openelm_mlx.quantization import QuantSpec, planned, stem_of

CACHE_BYTES = 256 << 20  # of freed buffers that MLX keeps


@contextlib.contextmanager
def small_cache() -> Iterator[None]:
    """Let MLX keep few freed buffers: matrices are of many sizes, and theirs would pile up."""
    before = mx.set_cache_limit(CACHE_BYTES)
    try:
        mx.set_cache_limit(min(before, CACHE_BYTES))
        yield
    finally:
        mx.set_cache_limit(before)


@small_cache()
def convert(options: ConvertOptions, progress: Progress | None = None) -> ConversionReport:
    """Convert `options.source` into `options.target`, which appears only when it is complete.

    Raises `ConversionError`, `CheckpointError`, `ConfigError`, `TokenizerError` or `OptionError`.
    A conversion that fails or is interrupted leaves nothing behind.
    """
    if not isinstance(options, ConvertOptions):
        raise OptionError(
            f"options is {shown(options)}; allowed is one made by ConvertOptions(source, target)"
        )
    check_target(options)
    check_inputs(options)
    if is_adapter(options.source):
        return convert_adapter(options)
    opened = open_model(options)
    check_apart(options.target, [*opened.source.files, opened.tokenizer.path])
    if opened.source.instruct and options.instruct is None:
        options = replace(options, instruct=True)
    if options.uses_text:
        options = in_one_type(opened, options)
    if opened.trimmed.max_context_length < 2 and (options.verifies or options.uses_text):
        raise ConversionError(
            f"{options.source} has a context of 1 token, so nothing is measured on text; leave out "
            "--verify, --max-kl, --target-bpw and --calibrate"
        )
    batches = verification_text(opened, options.verify_text) if options.verifies else []
    target = open_target(opened, options)
    text = activation_text(opened) if measures_activations(opened, options) else []
    asked = opened, options, target.nbytes(), batches, text
    memory = memory_needed(memory_steps(*asked))
    if not options.dry_run:
        check_space(options.target, target.nbytes())
        check_memory(memory, options)
    chosen = target.plan(progress)
    report = replace(make_report(opened, target, chosen, options), memory_bytes=memory)
    if options.dry_run:
        return replace(report, seconds=seconds_needed(*asked))
    if text:
        found = measure_activations(opened.trimmed, exact_weights(opened), text, progress)
        report = replace(report, activations=found)
    hashed = opened.source.files if target.keeps_record else ()
    with SourceHash(hashed) as hashes, staged(options) as folder:
        path = target.write(folder, chosen.plan, stream(opened, chosen, options, progress))
        if options.verifies:
            losses = verify(path, opened, batches, progress)
            quantized = bool(target.rounds(chosen.plan))
            check_bound(losses, options.max_kl, options.format, quantized)
            report = replace(report, verification=losses)
        target.write_record(folder, report, hashes.result())
    return report


def in_one_type(opened: OpenedModel, options: ConvertOptions) -> ConvertOptions:
    """Ask for float32 where the source has several types: measuring and learning know one only."""
    several = len({opened.source.tensors[name].dtype for name in opened.shapes}) > 1
    return replace(options, dtype="float32") if several and options.dtype is None else options


def open_target(opened: OpenedModel, options: ConvertOptions) -> Target:
    """Return the target that the options ask for. Raises an `OpenELMError` for what it refuses."""
    tensors = {}
    for name, shape in opened.shapes.items():
        stored = opened.source.tensors[name].dtype
        tensors[name] = TensorInfo(target_dtype(name, stored, opened.trimmed, options), shape)
    kind = GGUFTarget if options.is_gguf else FolderTarget
    return kind(opened, tensors, options)


def target_dtype(name: str, stored: str, config: OpenELMConfig, options: ConvertOptions) -> str:
    """Return the type that the tensor `name` is written in, before quantization."""
    dtype = options.dtype or stored.replace("float64", "float32")
    computed_in_float32 = options.is_gguf  # llama.cpp's activations are
    if dtype == "float16" and config.overflows_float16 and not computed_in_float32:
        raise ConversionError(
            "OpenELM-3B needs a wider range than float16 has; use --dtype bfloat16 or float32"
        )
    return dtype


def measures_activations(opened: OpenedModel, options: ConvertOptions) -> bool:
    """Return whether loading may choose a type by the largest activation: see `compute_dtype`."""
    written = target_dtype(NORM, opened.source.tensors[NORM].dtype, opened.trimmed, options)
    config = opened.trimmed
    may_choose = written == "float32" and not config.overflows_float16 and not options.is_gguf
    return options.measure and may_choose and config.max_context_length > 1


def make_report(
    opened: OpenedModel, target: Target, chosen: Quantization, options: ConvertOptions
) -> ConversionReport:
    """Return the report of what will be written, without the losses of the verification."""
    stored = opened.source.plan if options.keeps_plan else {}
    learned = {stem_of(name) for name in chosen.learned}
    kept = {stem for stem, spec in stored.items() if spec == chosen.plan.get(stem)} - learned
    rounded = set(opened.quantized)
    if chosen.plan:  # otherwise it will be measured, and hardly leave a matrix as it is
        rounded &= target.rounds(chosen.plan)
    return ConversionReport(
        target=options.target,
        config=opened.trimmed,
        source_bytes=sum(info.nbytes for info in opened.source.tensors.values()),
        written_bytes=target.nbytes(chosen.plan or None),
        dropped_rows=opened.config.vocab_size - opened.trimmed.vocab_size,
        plan=chosen.plan,
        types=target.types(chosen.plan),
        source_quantization=Counter(opened.quantized.values()),
        rounded_again=len(rounded - kept),
        dequantized=len(opened.quantized) - len(rounded),
        notes=target.notes,
        measured=chosen.measured,
    )


def stream(
    opened: OpenedModel, chosen: Quantization, options: ConvertOptions, progress: Progress | None
) -> Iterator[tuple[str, mx.array]]:
    """Yield the arrays to write, one after another.

    At most one tensor of the source is in memory, and only some rows of a matrix to be quantized.
    """
    stored = opened.source.plan if options.keeps_plan else {}
    for number, name in enumerate(opened.shapes, start=1):
        spec = planned(chosen.plan, name)
        if name in chosen.learned:
            yield from chosen.learned.pop(name).items()  # not in memory when the rest is written
        elif spec is None:
            yield name, as_asked(name, opened.load(name), options)
        elif spec == planned(stored, name):
            yield from opened.packed(name).items()
        else:
            yield from quantized_by_rows(opened, name, spec, options, chosen.fits).items()
        if progress is not None:
            progress(number, len(opened.shapes), name)


def quantized_by_rows(
    opened: OpenedModel, name: str, spec: QuantSpec, options: ConvertOptions, fits: bool
) -> dict[str, mx.array]:
    """Return the arrays of a quantized matrix, some rows at a time: no group crosses a row."""
    step = max(1, CHUNK_BYTES // (4 * opened.shapes[name][1]))
    parts: list[dict[str, mx.array]] = []
    for rows in opened.pieces(name, step):
        asked = as_asked(name, rows, options)
        parts.append(
            fitted(name, rows, spec, asked.dtype) if fits else quantized(name, asked, spec)
        )
        mx.async_eval(*parts[-1].values())  # while these are rounded, the next are read
        del rows
    return {key: mx.concatenate([part[key] for part in parts]) for key in parts[0]}


def as_asked(name: str, array: mx.array, options: ConvertOptions) -> mx.array:
    """Return `array` in the type asked for. Raises `ConversionError` for what overflows."""
    if options.dtype is not None:
        array = array.astype(DTYPES[options.dtype].mlx)
        # the other types have float32's range
        if options.dtype == "float16" and not_finite(array).item():
            raise ConversionError(
                f"{name} overflows {options.dtype}; use --dtype bfloat16 or float32"
            )
    return array
