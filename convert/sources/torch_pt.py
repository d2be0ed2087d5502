"""Read torch's zip format (`torch.save`) without torch and without trust.

A `.pt` is a zip: `NAME/data.pkl` pickles the structure, `NAME/data/KEY` holds each storage's raw bytes. The pickle
machine here can build ordered dicts and tensors and nothing else: any other global is refused by name, so that
opening a file never runs what somebody put in it.
"""

from __future__ import annotations

import io
import math
import pickle
import re
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
from openelm_mlx.convert.sources import TensorInfo, TensorSource
from openelm_mlx.convert.sources.raw import itemsize, read_strided

from openelm_mlx.errors import ConversionError

STORAGE_DTYPES = {
    "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16", "DoubleStorage": "float64",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip
MAX_PICKLE_BYTES = 64 << 20  # the 3B's is 60 KB
MAX_EXPANDED_BYTES = 1 << 30  # a stride of 0 makes a tensor larger than its storage; bounded, not forbidden
NESTED_UNDER = ("model", "state_dict", "model_state_dict")


class StorageRecord(NamedTuple):
    """A storage in the archive: what type of element, under which key, how many."""

    dtype: str
    key: str
    elements: int


@dataclass(frozen=True)
class TensorRecord:
    """A tensor as the pickle describes it: a strided window (in elements) on a storage."""

    storage: StorageRecord
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class TorchCheckpoint(TensorSource):
    """A state dict in a `.pt` file; tensors are listed on opening and read one at a time.

    Raises `ConversionError` when the file is not torch's zip format, is cut short, names a global outside the
    four that tensors need, or describes a tensor that does not lie within its storage.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with zipfile.ZipFile(self.path) as archive:
                self._root, self._members = checked_members(self.path, archive)
                check_byteorder(self.path, archive, self._members)
                state = read_pickle(self.path, archive, self._members["data.pkl"])
        except zipfile.BadZipFile:
            raise ConversionError(not_a_zip(self.path)) from None
        except OSError as error:
            raise ConversionError(f"{self.path} cannot be read: {error.strerror or error}") from None
        self._records = state_dict_of(self.path, state)
        self.tensors: dict[str, TensorInfo] = {}
        for name, record in self._records.items():
            self._check_bounds(name, record)
            self.tensors[name] = TensorInfo(record.storage.dtype, record.shape)

    def load(self, name: str) -> mx.array:
        """The tensor `name`, contiguous, in the type it is stored in."""
        record = self._records[name]
        member = self._members[f"data/{record.storage.key}"]
        start = data_offset(self.path, member)
        return read_strided(
            self.path,
            start,
            record.storage.elements,
            record.storage.dtype,
            record.shape,
            record.strides,
            record.offset,
        )

    def _check_bounds(self, name: str, record: TensorRecord) -> None:
        where = f"{self.path}: tensor {name}"
        storage, size = record.storage, itemsize(record.storage.dtype)
        member = self._members.get(f"data/{storage.key}")
        if member is None:
            raise ConversionError(f"{where} needs storage {storage.key}, which the archive does not hold")
        if storage.elements * size > member.file_size:
            raise ConversionError(
                f"{where} declares a storage of {storage.elements * size} bytes, but the archive holds {member.file_size}"
            )
        numbers = (*record.shape, *record.strides, record.offset)
        if len(record.shape) != len(record.strides) or len(record.shape) > 8 or min(numbers) < 0:
            raise ConversionError(
                f"{where} has an impossible shape {record.shape} with strides {record.strides}"
            )
        last = record.offset + sum(
            (n - 1) * step for n, step in zip(record.shape, record.strides, strict=True)
        )
        if 0 not in record.shape and last >= storage.elements:
            raise ConversionError(f"{where} reaches element {last} of a storage of {storage.elements}")
        if math.prod(record.shape) * size > max(storage.elements * size, MAX_EXPANDED_BYTES):
            raise ConversionError(f"{where} of shape {record.shape} is far larger than its storage")


def checked_members(path: Path, archive: zipfile.ZipFile) -> tuple[str, dict[str, zipfile.ZipInfo]]:
    """The archive's root folder and its records by name below it, once no name plays tricks."""
    size = path.stat().st_size
    members: dict[str, zipfile.ZipInfo] = {}
    roots = {info.filename.split("/", 1)[0] for info in archive.infolist()}
    for info in archive.infolist():
        parts = info.filename.split("/")
        if "\\" in info.filename or len(parts) < 2 or any(part in ("", ".", "..") for part in parts):
            raise ConversionError(
                f"{path} holds a record named {info.filename!r}; torch writes none such: refused"
            )
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ConversionError(
                f"{path}: record {info.filename!r} is compressed or encrypted; torch stores plainly"
            )
        if info.file_size != info.compress_size or info.header_offset + info.file_size > size:
            raise ConversionError(
                f"{path}: record {info.filename!r} declares more bytes than the file has; truncated?"
            )
        name = info.filename.split("/", 1)[1]
        if name in members:
            raise ConversionError(f"{path} holds two records named {info.filename!r}: refused")
        members[name] = info
    if len(roots) != 1 or "data.pkl" not in members:
        raise ConversionError(
            f"{path} is a zip file, but not a checkpoint of torch.save: it has no single NAME/data.pkl"
        )
    return roots.pop(), members


def check_byteorder(path: Path, archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]) -> None:
    info = members.get("byteorder")
    if info is not None and (info.file_size > 16 or archive.read(info).strip() != b"little"):
        raise ConversionError(f"{path} was not saved on a little-endian machine; save it again on one")


def read_pickle(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    """What data.pkl describes, with tensors as `TensorRecord`."""
    if info.file_size > MAX_PICKLE_BYTES:
        raise ConversionError(
            f"{path}: data.pkl has {info.file_size} bytes; no state dict needs above {MAX_PICKLE_BYTES}"
        )
    try:
        return TensorUnpickler(io.BytesIO(archive.read(info)), str(path)).load()
    except ConversionError:
        raise
    except zipfile.BadZipFile:
        raise
    except (
        Exception
    ) as error:  # a damaged pickle can raise anything; none of it may reach the user as a traceback
        raise ConversionError(f"{path}: data.pkl is damaged ({type(error).__name__}: {error})") from None


class RebuildTensor:
    """Stands for torch._utils._rebuild_tensor_v2. An object without attributes: a pickle cannot alter it."""

    __slots__ = ()

    def __call__(self, storage: Any, offset: Any, shape: Any, strides: Any, *ignored: Any) -> TensorRecord:
        if (
            not isinstance(storage, StorageRecord)
            or not isinstance(shape, tuple)
            or not isinstance(strides, tuple)
        ):
            raise ConversionError("data.pkl describes a tensor without a storage, a shape or strides")
        if any(type(number) is not int for number in (offset, *shape, *strides)):
            raise ConversionError(
                "data.pkl describes a tensor whose shape, strides or offset are no whole numbers"
            )
        return TensorRecord(storage, offset, shape, strides)


class RebuildParameter:
    """Stands for torch._utils._rebuild_parameter: a parameter is its tensor here."""

    __slots__ = ()

    def __call__(self, tensor: Any, *ignored: Any) -> TensorRecord:
        if not isinstance(tensor, TensorRecord):
            raise ConversionError("data.pkl describes a parameter that is no tensor")
        return tensor


class StorageType:
    """Stands for torch.FloatStorage and its like; known by identity, never called."""

    __slots__ = ("_dtype",)

    def __init__(self, dtype: str) -> None:
        object.__setattr__(self, "_dtype", dtype)

    def __setattr__(self, name: str, value: Any) -> None:
        raise ConversionError("data.pkl tries to alter a storage type: refused")

    @property
    def dtype(self) -> str:
        return self._dtype


GLOBALS: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": RebuildTensor(),
    "torch._utils._rebuild_parameter": RebuildParameter(),
    **{f"torch.{name}": StorageType(dtype) for name, dtype in STORAGE_DTYPES.items()},
}


class TensorUnpickler(pickle.Unpickler):
    """A pickle machine that can make ordered dicts and tensors and refuses every other global by name."""

    def __init__(self, stream: io.BytesIO, where: str) -> None:
        super().__init__(stream, encoding="utf-8")
        self._where = where

    def find_class(self, module: str, name: str) -> Any:
        try:
            return GLOBALS[f"{module}.{name}"]
        except KeyError:
            raise ConversionError(
                f"{self._where} asks for the global {module}.{name}, which no state dict of tensors needs: refused. "
                "Save it again as torch.save(model.state_dict(), path)"
            ) from None

    def persistent_load(self, pid: Any) -> StorageRecord:
        """torch's storages: ("storage", type, key, location, number of elements)."""
        if (
            isinstance(pid, tuple)
            and len(pid) == 5
            and pid[0] == "storage"
            and isinstance(pid[1], StorageType)
        ):
            key, elements = str(pid[2]), pid[4]
            if re.fullmatch(r"\w{1,64}", key, re.ASCII) and type(elements) is int and elements >= 0:
                return StorageRecord(pid[1].dtype, key, elements)
        raise ConversionError(
            f"{self._where}: data.pkl refers to a storage in a form torch does not write: {pid!r:.100}"
        )


def state_dict_of(path: Path, state: Any) -> dict[str, TensorRecord]:
    """The tensors by name, found at the top or under one of the usual keys of a training checkpoint."""
    if isinstance(state, dict):
        inner = next((state[key] for key in NESTED_UNDER if isinstance(state.get(key), dict)), state)
        odd = [
            str(name)
            for name, value in inner.items()
            if not (isinstance(value, TensorRecord) and type(name) is str)
        ]
        if inner and not odd:
            return dict(inner)
        if inner:
            raise ConversionError(f"{path} holds entries that are no tensors: {', '.join(odd[:3])}")
    raise ConversionError(f"{path} holds no tensors by name; it must be torch.save(model.state_dict(), path)")


def data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a stored record's bytes start: behind a local header whose length only the file itself tells."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ConversionError(f"{path}: record {info.filename!r} is damaged; the file may be truncated")
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return int(info.header_offset + 30 + name_length + extra_length)


def not_a_zip(path: Path) -> str:
    with open(path, "rb") as file:
        head = file.read(16)
    if head[:4] == b"PK\x03\x04":
        return f"{path} is truncated: its directory at the end is missing; download or copy it again"
    if head[:1] == b"\x80":
        return (
            f"{path} is in torch's legacy format (before torch 1.6), which is not read here; "
            "load it with torch and save it again"
        )
    return f"{path} is no checkpoint of torch.save (no zip file); give a CoreNet .pt file or a Hugging Face folder"
