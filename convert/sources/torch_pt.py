"""Read torch's zip format (`torch.save`) without torch and without trust.

A `.pt` is a zip: `NAME/data.pkl` pickles the structure, `NAME/data/KEY` holds each storage's raw
bytes. The pickle reader here (`safe_pickle`) builds dicts and tensors and nothing else: any other
global is refused by name, so that opening a file never runs what somebody put in it. A record's
checksum is compared when its tensor is loaded.
"""

from __future__ import annotations

import math
import stat
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from openelm_mlx.convert.sources import TensorSource, canonical
from openelm_mlx.convert.sources.raw import read_strided
from openelm_mlx.convert.sources.safe_pickle import TensorRecord, read_state
from openelm_mlx.device import mx
from openelm_mlx.dtypes import itemsize
from openelm_mlx.errors import ConversionError
from openelm_mlx.files import TensorInfo

MAX_PICKLE_BYTES = 8 << 20  # the 3B's has 60 KB
DAMAGED_ZIP = (
    zipfile.BadZipFile,
    NotImplementedError,
    RuntimeError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
)
NESTED_UNDER = ("model", "state_dict", "model_state_dict")


class TorchCheckpoint(TensorSource):
    """A state dict in a `.pt` file; tensors are listed on opening and read one at a time.

    Raises `ConversionError` when the file is not torch's zip format, is cut short, names a global
    outside the four that tensors need, or describes a tensor that does not lie within its storage.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._intact: set[str] = set()  # storages whose checksum has been compared
        try:
            with open_zip(self.path) as archive:
                self._members = checked_members(self.path, archive)
                check_byteorder(self.path, archive, self._members)
                state = read_pickle(self.path, archive, self._members["data.pkl"])
        except OSError as error:
            raise ConversionError(
                f"{self.path} cannot be read: {error.strerror or error}"
            ) from None
        except DAMAGED_ZIP as error:
            raise ConversionError(
                f"{self.path} is damaged: {str(error):.200}; download or copy it again"
            ) from None
        self._records = canonical(state_dict_of(self.path, state))
        self.tensors: dict[str, TensorInfo] = {}
        for name, record in self._records.items():
            self._check_bounds(name, record)
            self.tensors[name] = TensorInfo(record.storage.dtype, record.shape)

    def load(self, name: str) -> mx.array:
        """The tensor `name`, contiguous, in the type it is stored in."""
        return self._read(self._records[name])

    def rows(self, name: str, start: int, stop: int) -> mx.array:
        record = self._records[name]
        offset = record.offset + start * record.strides[0]
        return self._read(replace(record, offset=offset, shape=(stop - start, *record.shape[1:])))

    def _read(self, record: TensorRecord) -> mx.array:
        storage = record.storage
        member = self._members[f"data/{storage.key}"]
        start = data_offset(self.path, member)
        if storage.key not in self._intact:
            check_crc(self.path, member, start)
            self._intact.add(storage.key)
        return read_strided(
            self.path,
            start,
            storage.elements,
            storage.dtype,
            record.shape,
            record.strides,
            record.offset,
        )

    def _check_bounds(self, name: str, record: TensorRecord) -> None:
        where = f"{self.path}: tensor {name}"
        storage, size = record.storage, itemsize(record.storage.dtype)
        member = self._members.get(f"data/{storage.key}")
        if member is None:
            raise ConversionError(
                f"{where} needs storage {storage.key}, which the archive does not hold"
            )
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
            raise ConversionError(
                f"{where} reaches element {last} of a storage of {storage.elements}"
            )
        if (
            math.prod(record.shape) > storage.elements
        ):  # a stride of 0 can make any size out of one number
            raise ConversionError(f"{where} of shape {record.shape} is larger than its storage")


def open_zip(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except DAMAGED_ZIP:
        raise ConversionError(not_a_zip(path)) from None


def check_crc(path: Path, member: zipfile.ZipInfo, start: int) -> None:
    """Compare a record with its checksum; 0 stands for none. Raises `ConversionError`.

    torch computes it unless told not to (torch.serialization.set_crc32_options): what does not
    match is damaged.
    """
    crc, left = 0, member.file_size
    if member.CRC == 0:
        return
    with open(path, "rb") as file:
        file.seek(start)
        while left and (block := file.read(min(left, 1 << 20))):
            crc, left = zlib.crc32(block, crc), left - len(block)
    if crc != member.CRC:
        raise ConversionError(
            f"{path}: record {member.filename!r} does not match its checksum: the file is damaged; download or copy it again"
        )


def checked_members(path: Path, archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The archive's records by their names below its root folder, once no name plays tricks."""
    size = path.stat().st_size
    members: dict[str, zipfile.ZipInfo] = {}
    roots = {info.filename.split("/", 1)[0] for info in archive.infolist()}
    for info in archive.infolist():
        parts = info.filename.split("/")
        if (
            "\\" in info.filename
            or len(parts) < 2
            or any(part in ("", ".", "..") for part in parts)
        ):
            raise ConversionError(
                f"{path} holds a record named {info.filename!r}; torch writes none such: refused"
            )
        if stat.S_ISLNK(info.external_attr >> 16):
            raise ConversionError(
                f"{path}: record {info.filename!r} is a link; torch writes none such: refused"
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
    return members


def check_byteorder(
    path: Path, archive: zipfile.ZipFile, members: Mapping[str, zipfile.ZipInfo]
) -> None:
    info = members.get("byteorder")
    if info is not None and (info.file_size > 16 or archive.read(info).strip() != b"little"):
        raise ConversionError(
            f"{path} was not saved on a little-endian machine; save it again on one"
        )


def read_pickle(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    """What data.pkl describes, with tensors as `TensorRecord`."""
    if info.file_size > MAX_PICKLE_BYTES:
        raise ConversionError(
            f"{path}: data.pkl has {info.file_size} bytes; no state dict needs above {MAX_PICKLE_BYTES}"
        )
    return read_state(archive.read(info), str(path))


def state_dict_of(path: Path, state: Any) -> dict[str, TensorRecord]:
    """The tensors by name, found at the top or under one of the usual keys of a training
    checkpoint.
    """
    if isinstance(state, dict):
        inner = next(
            (state[key] for key in NESTED_UNDER if isinstance(state.get(key), dict)), state
        )
        odd = [
            str(name)
            for name, value in inner.items()
            if not (isinstance(value, TensorRecord) and type(name) is str)
        ]
        if inner and not odd:
            return dict(inner)
        if inner:
            raise ConversionError(f"{path} holds entries that are no tensors: {', '.join(odd[:3])}")
    raise ConversionError(
        f"{path} holds no tensors by name; it must be torch.save(model.state_dict(), path)"
    )


def data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Where a stored record's bytes start: behind a local header whose length only the file itself
    tells.
    """
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
    return f"{path} is no checkpoint of torch.save (no zip file); give a CoreNet .pt file or a Hugging Face folder"
