"""Sources of training data: files, folders and datasets of Hugging Face, record by record.

pairs.jsonl       an object a line, or an array of objects
story.txt         a text; where a line is <|endoftext|>, another text begins
data.parquet      a table, as .csv, or a folder of such files, read by the library datasets
owner/name        a dataset of the hub; owner/name:split and owner/name:subset:split name a part
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from openelm_mlx.errors import FinetuneError, reason
from openelm_mlx.files import MAX_TEXT_BYTES, read_text

OBJECTS = (".jsonl", ".ndjson", ".json")
TABLES = {".parquet": "parquet", ".csv": "csv"}  # and how the library datasets calls them
TEXTS = (".txt", ".text", ".md", ".markdown", ".rst")
LOCAL = {"streaming": True}  # files are read as they are; otherwise all go into a cache first
DIVIDER = "<|endoftext|>"  # between texts in a file, as in TinyStories
OTHERWISE = {  # what a file begins with that is no text as it is
    codecs.BOM_UTF16_LE: "is UTF-16; convert it to UTF-8, for example with iconv",
    codecs.BOM_UTF16_BE: "is UTF-16; convert it to UTF-8, for example with iconv",
    b"\x1f\x8b": "is compressed; unpack it with gunzip",
    b"\x28\xb5\x2f\xfd": "is compressed; unpack it with unzstd",
    b"PK\3\4": "is a ZIP archive; unpack it",
}
MAX_LINE = 16 << 20  # bytes; the longest text of a line that is sensible has fewer
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
ALLOWED = "a JSONL or text file, a folder of tables, or a dataset of Hugging Face, as owner/name"


def raw_records(source: str | Path) -> Iterator[tuple[str, Any]]:
    """Yield each record of a source and its place in it: "line 3", "row 0" (the dataset's index).

    A line that cannot be read comes as a `FinetuneError`, for others to be read. Raises
    `FinetuneError`, or `OptionError` for a text file, if the source itself cannot be read.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        yield from rows(*dataset_of(str(source), path))
        return
    suffix = path.suffix.lower()
    if suffix in TABLES:
        how = {"data_files": str(path), **LOCAL}
        yield from rows(TABLES[suffix], how, "train")
        return
    try:
        with open(path, "rb") as file:
            start = file.read(4096)
    except OSError as error:
        raise FinetuneError(f"{path} cannot be read: {error.strerror}; give {ALLOWED}") from None
    for mark, what in OTHERWISE.items():
        if start.startswith(mark):
            raise FinetuneError(f"{path} {what}")
    start = start.removeprefix(codecs.BOM_UTF8).lstrip()[:1]
    if suffix in TEXTS or (suffix not in OBJECTS and start not in (b"{", b"[")):
        yield from texts(path)
    else:
        yield from elements(path) if start == b"[" else lines(path)


def texts(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the texts of a file, with line breaks of one kind and none around a text."""
    whole = read_text(path, "data").replace("\r\n", "\n")
    if "\0" in whole:
        raise FinetuneError(f"{path} is no text: it has zero bytes; give {ALLOWED}")
    parts = re.split(rf"^{re.escape(DIVIDER)}[ \t]*$\n?", whole, flags=re.MULTILINE)
    for number, part in enumerate(filter(str.strip, parts), 1):
        yield f"text {number}", {"text": part.strip("\n")}


def lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the values of a JSONL file; blank lines are passed over."""
    with open(path, "rb") as file:
        number = 0
        while line := file.readline(MAX_LINE + 1):
            number += 1
            line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
            if len(line) > MAX_LINE:
                raise FinetuneError(f"{path}, line {number} has more than {MAX_LINE >> 20} MiB")
            if line.strip():
                yield f"line {number}", parsed(line.rstrip())


def parsed(line: bytes) -> Any:
    """Return the value of a line, or the `FinetuneError` that says why there is none."""
    try:
        return json.loads(line.decode())
    except UnicodeDecodeError as error:
        return FinetuneError(f"is not UTF-8 at byte {error.start + 1}")
    except json.JSONDecodeError as error:
        return FinetuneError(f"is not JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return FinetuneError(f"is not JSON that can be read: {reason(error)}")


def elements(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield the elements of a file that is one JSON array."""
    if path.stat().st_size > MAX_TEXT_BYTES:
        what = f"{path} is an array of more than {MAX_TEXT_BYTES >> 20} MiB"
        raise FinetuneError(f"{what}; write one object a line (JSONL), which is read line by line")
    try:
        found = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise FinetuneError(f"{path} cannot be read as a JSON array: {reason(error)}") from None
    for number, value in enumerate(found, 1):
        yield f"element {number}", value


def dataset_of(name: str, path: Path) -> tuple[str, dict[str, Any], str]:
    """Return what the library datasets calls a folder or a dataset of the hub, and the split.

    Raises `FinetuneError` for what is neither.
    """
    if not name:
        raise FinetuneError(f"the name of the data is empty; give {ALLOWED}")
    base, *parts = re.split(r":(?![^[]*])", name)  # train[:9] is one part
    folder = path if path.is_dir() else Path(base).expanduser()
    split = parts[-1] if parts and all(parts) else "train"
    if folder.is_dir() and len(parts) < 2:
        return str(folder), {**LOCAL}, split
    if path.exists():
        raise FinetuneError(f"{name} is not a regular file; give {ALLOWED}")
    suffix = Path(base).suffix.lower()
    of_file = suffix in (*OBJECTS, *TABLES, *TEXTS) or Path(base).parent.is_dir()
    if of_file or len(parts) > 2 or not all(parts) or not HUB_NAME.fullmatch(base):
        raise FinetuneError(f"{name} does not exist; give {ALLOWED}")
    return base, {"name": parts[0]} if len(parts) == 2 else {}, split


def rows(name: str, how: dict[str, Any], split: str) -> Iterator[tuple[str, Any]]:
    """Yield the rows of a split that the library datasets reads."""
    shown = how.get("data_files", name)
    try:
        import datasets
    except ImportError:
        what = f"{shown} is read by the library datasets, which is not installed"
        raise FinetuneError(f"{what}; pip install 'openelm-mlx[finetune]'") from None
    local = how.get("streaming", False)
    try:
        with TemporaryDirectory() as folder:  # the usual cache is for what comes from the hub
            own = {"cache_dir": folder} if local else {}
            table = datasets.load_dataset(name, split=split, **how, **own)
            for number, row in enumerate(table):
                yield f"row {number}", row
    except Exception as error:  # of many libraries: the hub's, Arrow's, those of formats
        what = f"{shown} cannot be read as a dataset with a split {split!r}: {reason(error)}"
        what += "; check what is in it" if local else "; check the name and the network"
        of_split = f", or give another split as {name}:SPLIT"
        raise FinetuneError(what + of_split * ("data_files" not in how)) from None
