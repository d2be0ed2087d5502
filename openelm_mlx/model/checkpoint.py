"""A model's tensors as files have them: how they are quantized, what is no number, which are one.

Loading and converting read files through these functions, so that both accept and refuse the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from openelm_mlx.device import mx
from openelm_mlx.dtypes import FLOATS
from openelm_mlx.errors import CheckpointError, reason
from openelm_mlx.files import TensorInfo, TensorPlace, name_for_mlx, read_json, read_places
from openelm_mlx.model.config import EMBEDDINGS, HEAD, OpenELMConfig, expected_tensors
from openelm_mlx.model.names import canonical, canonical_name, frequencies, split
from openelm_mlx.quantization import Plan, QuantSpec, matrices, quantization_of, spec_of

Shapes = Mapping[str, tuple[int, ...]]
PARTS = ("weight", "scales", "biases")  # of a quantized matrix, in the order of mlx.core.quantize
# a type -> integers of its size, the bits of infinity, and the sign bit
BITS = {
    mx.float32: (mx.int32, mx.uint32, 0x7F800000, 1 << 31),
    mx.bfloat16: (mx.int16, mx.uint16, 0x7F80, 1 << 15),
    mx.float16: (mx.int16, mx.uint16, 0x7C00, 1 << 15),
}


class Unpacked(NamedTuple):
    """Tensors as they are without quantization, and the specs of those that are quantized."""

    tensors: dict[str, TensorInfo]
    specs: dict[str, QuantSpec]  # by stem


class Headers(NamedTuple):
    """The configuration and the headers of a model folder; no weights are read for them."""

    config: OpenELMConfig
    places: dict[str, tuple[str, TensorPlace]]  # the name in the file, and the place there
    specs: dict[str, QuantSpec]
    quantization: Mapping[str, Any] | None  # as in config.json, with false for the others


def unpacked(stored: Mapping[str, TensorInfo], quantization: Mapping[str, Any] | None) -> Unpacked:
    """Return the tensors behind stored ones, by the `quantization` of config.json.

    Raises `CheckpointError` or `ConfigError` if the parts of a matrix do not fit together.
    """
    stems = {name.removesuffix(".scales") for name in stored if name.endswith(".scales")}
    if stems and quantization is None:
        what = "the folder contains quantized weights, but its config.json has no quantization"
        raise CheckpointError(what)
    entries = {canonical_name(str(key)): value for key, value in (quantization or {}).items()}
    vectors = (info.dtype for info in stored.values() if len(info.shape) == 1)
    plain = next((dtype for dtype in vectors if dtype in FLOATS), "bfloat16")
    result = Unpacked({}, {})
    for name, info in stored.items():
        stem, part = split(name)
        if stem in stems and part == "weight":
            spec = spec_of(entries, stem)
            if spec is None:
                what = f"{stem} is quantized, but config.json says that it is not"
                raise CheckpointError(what)
            result.specs[stem] = spec
            result.tensors[name] = without_packing(stored, stem, spec, plain)
        elif stem not in stems or part not in PARTS:
            result.tensors[name] = info
    if lost := sorted(stems - result.specs.keys()):
        raise CheckpointError(f"{lost[0]}.scales has no weight beside it")
    return result


def without_packing(
    stored: Mapping[str, TensorInfo], stem: str, spec: QuantSpec, plain: str
) -> TensorInfo:
    """Return type and shape of the unquantized matrix, once its parts are seen to fit."""
    affine = spec.mode == "affine"
    parts = {part: stored.get(f"{stem}.{part}") for part in PARTS}
    weight, scales, biases = parts.values()
    rows = columns = 0
    if weight is not None and len(weight.shape) == 2 and weight.dtype == "uint32":
        rows, columns = weight.shape[0], weight.shape[1] * 32 // spec.bits
    dtype = scales.dtype if affine and scales else "uint8"
    side = TensorInfo(dtype, (rows, columns // spec.group_size))
    sizes_fit = rows > 0 and columns > 0 and columns % spec.group_size == 0
    sides_fit = scales == side and biases == (side if affine else None)
    if not sizes_fit or not sides_fit or (affine and dtype not in FLOATS):
        listed = ", ".join(f"{name} {described(info)}" for name, info in parts.items())
        raise CheckpointError(
            f"the parts of {stem} ({listed}) do not make a matrix of {spec.bits} bits in groups of "
            f"{spec.group_size} ({spec.mode})"
        )
    return TensorInfo(dtype if affine else plain, (rows, columns))


def described(info: TensorInfo | None) -> str:
    return "none" if info is None else f"{info.dtype} {list(info.shape)}"


def read_headers(folder: Path) -> Headers:
    """Read the headers of a model folder, and see that they make the model of its config.json.

    Names are Hugging Face's. Raises `ConfigError` or `CheckpointError`.
    """
    raw = read_json(folder / "config.json")
    config = OpenELMConfig.from_hf_dict(raw).with_eos_of(folder)
    quantization = quantization_of(raw)
    found = {name: (name, place) for name, place in read_places(folder).items()}
    if buffer := frequencies(found):
        name, place = buffer
        check_frequencies(config, place.info, lambda: load_file(place.file)[name])
    places = canonical(found)
    if not states_own_head(raw) and has_copied_head(places):
        places = {name: found for name, found in places.items() if not name.startswith(f"{HEAD}.")}
    stored = {name: place.info for name, (_, place) in places.items()}
    tensors, specs = unpacked(stored, quantization)
    config = with_head_of(config, tensors)
    expected = expected_tensors(config)
    check_tensors(tensors, expected)
    if quantization:
        stated = {canonical_name(key): value for key, value in quantization.items()}
        quantization = stated | {stem: False for stem in matrices(expected) if stem not in specs}
    return Headers(config, places, specs, quantization)


def read_weights(headers: Headers) -> dict[str, mx.array]:
    """Return all tensors by their canonical names, neither in memory nor checked yet."""
    places = headers.places.items()
    loaded = {path: load_file(path) for path in sorted({place.file for _, (_, place) in places})}
    return {known: loaded[place.file][name] for known, (name, place) in places}


def load_file(path: Path) -> dict[str, mx.array]:
    """Return the tensors of a safetensors file, not in memory yet. Raises `CheckpointError`."""
    try:
        return mx.load(name_for_mlx(path), format="safetensors")  # type: ignore[return-value]
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}") from None


def check_frequencies(
    config: OpenELMConfig, info: TensorInfo, read: Callable[[], mx.array]
) -> None:
    """Raise `CheckpointError` if a file has other rotary frequencies than the model computes.

    A half type rounds them by up to 0.4 %.
    """
    half, base = config.head_dim // 2, config.rope_freq_constant
    if math.prod(info.shape) == half and info.dtype in ("float64", *FLOATS):
        wanted = [base ** (-place / half) for place in range(half)]
        found: Any = read().astype(mx.float32).reshape(-1).tolist()
        if all(abs(a - b) <= 0.01 * b for a, b in zip(found, wanted, strict=True)):
            return
    raise CheckpointError(
        f"inv_freq is not that of head_dim {config.head_dim} and base {base:g}: give the base of "
        "the rotary embeddings as --rope-base, or as rope_freq_constant in config.json"
    )


def has_copied_head(places: Mapping[str, tuple[str, TensorPlace]]) -> bool:
    """Return whether there is a head, all of whose parts repeat those of the embeddings."""
    head, embeddings = (
        {split(name)[1]: place for name, (_, place) in places.items() if split(name)[0] == stem}
        for stem in (HEAD, EMBEDDINGS)
    )
    whole = "weight" in head and head.keys() == embeddings.keys()
    return whole and all(same_bytes(place, embeddings[part]) for part, place in head.items())


def same_bytes(one: TensorPlace, other: TensorPlace) -> bool:
    """Return whether two tensors are the same in their files, bit for bit."""
    left = one.info.nbytes if one.info == other.info else -1
    with open(one.file, "rb") as first, open(other.file, "rb") as second:
        first.seek(one.start)
        second.seek(other.start)
        while left > 0:
            size = min(left, 1 << 20)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return left == 0


def states_own_head(raw: Mapping[str, Any]) -> bool:
    """Return whether a config.json says that the head is not the embeddings."""
    return raw.get("share_input_output_layers") is False


def with_head_of(config: OpenELMConfig, found: Collection[str]) -> OpenELMConfig:
    """Return the configuration of a model that has a head of its own if a file contains one.

    A head that repeats the embeddings should be left out before.
    """
    own = config.share_input_output_layers and f"{HEAD}.weight" in found
    return replace(config, share_input_output_layers=False) if own else config


def check_tensors(found: Mapping[str, TensorInfo], expected: Shapes) -> None:
    """Raise `CheckpointError` that names the first tensors missing, superfluous, of another shape
    or not of floating-point numbers.
    """
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"{len(missing)} missing ({', '.join(missing[:3])})")
    if extra := [name for name in found if name not in expected]:
        problems.append(f"{len(extra)} the model does not have ({', '.join(extra[:3])})")
    for name in expected.keys() & found.keys():
        dtype, shape = found[name]
        if tuple(shape) != tuple(expected[name]):
            asked = f"where the configuration asks for {tuple(expected[name])}"
            problems.append(f"{name} has shape {tuple(shape)} {asked}")
        elif dtype not in ("float64", *FLOATS):
            problems.append(f"{name} is {dtype}; weights must be floating-point numbers")
    if problems:
        text = "; ".join(problems[:3])
        raise CheckpointError(f"the tensors do not make this model: {text}")


def check_finite(arrays: Mapping[str, mx.array], specs: Plan) -> None:
    """Raise `CheckpointError` for NaN and infinities. `specs` are those of quantized matrices."""
    check_flags(odd_flags(arrays, specs))


def odd_flags(arrays: Mapping[str, mx.array], specs: Plan) -> dict[str, mx.array]:
    """Return for each array whether it has NaN or infinities, not computed yet."""
    flags = {name: odd(name, array, specs) for name, array in arrays.items()}
    return {name: flag for name, flag in flags.items() if flag is not None}


def check_flags(flags: Mapping[str, mx.array]) -> None:
    """Raise `CheckpointError` if any array is odd; `flags` are those of `odd_flags`."""
    if not flags or not mx.stack(list(flags.values())).any().item():
        return
    name = next(name for name, flag in flags.items() if flag.item())
    what = "scales" if name.endswith((".scales", ".biases")) else "weights"
    raise CheckpointError(f"{name} has NaN or infinite {what}; the checkpoint is damaged")


def odd(name: str, array: mx.array, specs: Plan) -> mx.array | None:
    """Return whether a stored array has NaN or infinities, not computed yet; None if it cannot."""
    if array.size == 0:
        return None
    if array.dtype in BITS:
        return not_finite(array)
    stem, part = split(name)
    spec = specs.get(stem)
    mode = "affine" if spec is None else spec.mode
    if (mode, part) in (("nvfp4", "scales"), ("mxfp8", "weight")):  # numbers in E4M3
        return (array.view(mx.uint8) & 0x7F).max() == 0x7F
    if mode != "affine" and part == "scales":  # exponents, E8M0
        return array.max() == 0xFF
    return None


def not_finite(array: mx.array) -> mx.array:
    """Return whether floating-point numbers have NaN or infinities among them, not computed yet.

    Their bits tell: as integers such numbers are the largest, with the sign and without it. (The
    CPU finds the largest integer many times faster than the largest half-precision number.)
    """
    signed, unsigned, infinity, sign = BITS[array.dtype]
    above = array.view(signed).max() >= mx.array(infinity, signed)
    return above | (array.view(unsigned).max() >= mx.array(infinity | sign, unsigned))


def equal_bits(one: mx.array, other: mx.array) -> bool:
    """Return whether two arrays are the same, bit for bit."""
    same = one.shape == other.shape and one.dtype == other.dtype
    return same and bool(mx.array_equal(one.view(mx.uint8), other.view(mx.uint8)).item())
