"""Checkpoints in torch's zip format (`torch.save`), read without torch and without trust.

A `.pt` is a zip: `NAME/data.pkl` pickles the structure, `NAME/data/KEY` contains each storage's raw
bytes. The pickle reader here (`safe_pickle`) builds dicts and tensors and nothing else: it refuses
any other global by name, so that opening a file never runs what somebody put in it. A record's
checksum is compared when its tensor is loaded.
"""

from __future__ import annotations

import math
import stat
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from openelm_mlx.convert.sources import DAMAGED_ZIP, TensorSource
from openelm_mlx.convert.sources.folder import read_strided
from openelm_mlx.convert.sources.safe_pickle import TensorRecord, read_state
from openelm_mlx.device import mx
from openelm_mlx.dtypes import itemsize
from openelm_mlx.errors import ConversionError
from openelm_mlx.files import TensorInfo
from openelm_mlx.model.names import canonical, frequencies

MAX_PICKLE_BYTES = 8 << 20  # the 3B's has 60 KB
NESTED_UNDER = ("model", "state_dict", "model_state_dict")


class TorchCheckpoint(TensorSource):
    """A state dict in a `.pt` file.

    Raises `ConversionError` if the file is not in torch's zip format, is cut short, names a
    global that tensors do not need, or describes a tensor that does not lie within its storage.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._intact: set[str] = set()  # storages whose checksum has been compared
        try:
            with open_zip(self.path) as archive:
                self._members = checked_members(self.path, archive)
            check_byteorder(self.path, self._members.get("byteorder"))
            pickled = read_record(self.path, self._members["data.pkl"])
            state = read_state(pickled, str(self.path))
        except OSError as error:
            raise ConversionError(
                f"{self.path} cannot be read: {error.strerror or error}"
            ) from None
        except DAMAGED_ZIP as error:
            raise ConversionError(
                f"{self.path} is damaged: {str(error):.200}; download or copy it again"
            ) from None
        found = state_dict_of(self.path, state)
        self._records = canonical(found)
        self.tensors: dict[str, TensorInfo] = {}
        for name, record in self._records.items():
            self._check_bounds(name, record)
            self.tensors[name] = TensorInfo(record.storage.dtype, record.shape)
        if buffer := frequencies(found):
            self._check_bounds("inv_freq", buffer)
            info = TensorInfo(buffer.storage.dtype, buffer.shape)
            self.rotary = info, partial(self._read, buffer)

    def load(self, name: str) -> mx.array:
        return self._read(self._records[name])

    def reader(self, name: str) -> Callable[[int, int], mx.array]:
        return partial(self._rows, self._records[name])

    def _rows(self, record: TensorRecord, start: int, stop: int) -> mx.array:
        offset = record.offset + start * record.strides[0]
        return self._read(replace(record, offset=offset, shape=(stop - start, *record.shape[1:])))

    def _read(self, record: TensorRecord) -> mx.array:
        storage = record.storage
        member = self._members[f"data/{storage.key}"]
        start = data_offset(self.path, member)
        if storage.key not in self._intact:
            check_crc(self.path, member, start)
            self._intact.add(storage.key)
        window = record.shape, record.strides, record.offset
        array = read_strided(self.path, start, storage.elements, storage.dtype, *window)
        return -array if record.negated else array

    def _check_bounds(self, name: str, record: TensorRecord) -> None:
        where = f"{self.path}: tensor {name}"
        storage, shape, strides = record.storage, record.shape, record.strides
        needed = storage.elements * itemsize(storage.dtype)
        member = self._members.get(f"data/{storage.key}")
        if member is None:
            raise ConversionError(
                f"{where} needs storage {storage.key}, which the archive does not contain"
            )
        if needed > member.file_size:
            raise ConversionError(
                f"{where} declares a storage of {needed} bytes, but the archive contains "
                f"{member.file_size}"
            )
        least = min((*shape, *strides, record.offset))
        if len(shape) != len(strides) or len(shape) > 8 or least < 0:
            raise ConversionError(f"{where} has an impossible shape {shape} with strides {strides}")
        steps = ((n - 1) * step for n, step in zip(shape, strides, strict=True))
        last = record.offset + sum(steps)
        if 0 not in shape and last >= storage.elements:
            raise ConversionError(
                f"{where} reaches element {last} of a storage of {storage.elements}"
            )
        if math.prod(shape) > storage.elements:  # a stride of 0 makes any size out of one number
            raise ConversionError(f"{where} of shape {shape} is larger than its storage")


def open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except DAMAGED_ZIP:
        raise ConversionError(not_a_zip(path)) from None


def check_crc(path: Path, member: zipfile.ZipInfo, start: int) -> None:
    """Compare a record with its checksum. Raises `ConversionError`."""
    crc, left = 0, member.file_size
    if member.CRC == 0:  # torch was told to compute none (torch.serialization.set_crc32_options)
        return
    with open(path, "rb") as file:
        file.seek(start)
        while left and (block := file.read(min(left, 1 << 20))):
            crc, left = zlib.crc32(block, crc), left - len(block)
    if crc != member.CRC:
        raise ConversionError(
            f"{path}: record {member.filename!r} does not match its checksum: the file is damaged; "
            "download or copy it again"
        )


def checked_members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the archive's records by their names below its root folder.

    Raises `ConversionError` for names and flags that play tricks.
    """
    size = path.stat().st_size
    members: dict[str, zipfile.ZipInfo] = {}
    roots = {info.filename.split("/", 1)[0] for info in archive.infolist()}
    for info in archive.infolist():
        parts, where = info.filename.split("/"), f"{path}: record {info.filename!r}"
        odd = len(parts) < 2 or any(part in ("", ".", "..") for part in parts)
        if "\\" in info.filename or odd:
            raise ConversionError(
                f"{path} contains a record named {info.filename!r}; torch writes none such: refused"
            )
        if stat.S_ISLNK(info.external_attr >> 16):
            raise ConversionError(f"{where} is a link; torch writes none such: refused")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise ConversionError(f"{where} is compressed or encrypted; torch stores plainly")
        if info.file_size != info.compress_size or info.header_offset + info.file_size > size:
            raise ConversionError(f"{where} declares more bytes than the file has; truncated?")
        name = info.filename.split("/", 1)[1]
        if name in members:
            raise ConversionError(f"{path} contains two records named {info.filename!r}: refused")
        members[name] = info
    if len(roots) != 1 or "data.pkl" not in members:
        raise ConversionError(
            f"{path} is a zip file, but not a checkpoint of torch.save: it has no single "
            "NAME/data.pkl"
        )
    if (size := members["data.pkl"].file_size) > MAX_PICKLE_BYTES:
        raise ConversionError(
            f"{path}: data.pkl has {size} bytes; no state dict needs above {MAX_PICKLE_BYTES}"
        )
    return members


def read_record(path: Path, info: zipfile.ZipInfo) -> bytes:
    """Return a record's bytes, as `zipfile` would if it knew of records without a checksum."""
    start = data_offset(path, info)
    check_crc(path, info, start)
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(info.file_size)


def check_byteorder(path: Path, info: zipfile.ZipInfo | None) -> None:
    if info is not None and (info.file_size > 16 or read_record(path, info).strip() != b"little"):
        raise ConversionError(
            f"{path} was not saved on a little-endian machine; save it again on one"
        )


def state_dict_of(path: Path, state: Any) -> dict[str, TensorRecord]:
    """Return the tensors by name, from the top of the state or from one of the usual keys of a
    training checkpoint.
    """
    if isinstance(state, dict):
        nested = (state[key] for key in NESTED_UNDER if isinstance(state.get(key), dict))
        inner = next(nested, state)
        odd = [n for n, of in inner.items() if type(n) is not str or type(of) is not TensorRecord]
        if odd:
            listed = ", ".join(map(str, odd[:3]))
            raise ConversionError(f"{path} contains entries that are not tensors: {listed}")
        if inner:
            return dict(inner)
    raise ConversionError(
        f"{path} contains no tensors by name; it must be torch.save(model.state_dict(), path)"
    )


def data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Return the offset of a record's bytes, after a header whose length only the file states."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        header = file.read(30)
    if len(header) < 30 or header[:4] != b"PK\x03\x04":
        raise ConversionError(
            f"{path}: record {info.filename!r} is damaged; the file may be truncated"
        )
    name_length, extra_length = struct.unpack("<HH", header[26:30])
    return int(info.header_offset + 30 + name_length + extra_length)


def not_a_zip(path: Path) -> str:
    with open(path, "rb") as file:
        head = file.read(16)
    if head[:4] == b"PK\x03\x04":
        return (
            f"{path} is truncated: its directory at the end is missing; download or copy it again"
        )
    if head[:1] == b"\x80":
        return (
            f"{path} is in torch's legacy format (before torch 1.6), which is not read here; "
            "load it with torch and save it again"
        )
    return (
        f"{path} is not a checkpoint of torch.save (not a zip file); give a CoreNet .pt file or a "
        "Hugging Face folder"
    )
