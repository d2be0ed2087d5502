"""The files of a batch: requests, one a line, and their answers, which outlive the process.

The input is read once to learn where its lines begin, and again line by line as rows become free.
Each process appends answers to a part of its own, OUT.part-RANK, as they end. Once the parts have
an answer to every line, they are joined in the order of the input. Of a line, memory has a few
numbers only. https://platform.openai.com/docs/guides/batch has the format.
"""

from __future__ import annotations

import fcntl
import glob
import json
import os
import time
from array import array
from bisect import bisect_left
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, NamedTuple

from openelm_mlx.errors import OptionError
from openelm_mlx.files import NO_LOCKS, replacing
from openelm_mlx.server.options import ServerOptions

LINE_BYTES = ServerOptions.max_body
BLOCK = 32  # lines that stay together, as neighbours often share the beginning of their prompts
PROMPT_BYTES = 16  # of a line, which take about as long as one new token
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
USUAL_TOKENS = 256  # of an answer without a limit
SYNC_SECONDS = 5.0  # a power cut loses the answers of this time at most; they are run again
ID = "batch_req_"
MARK = b"\xef\xbb\xbf"  # may begin a file of text


def number_of(custom_id: str) -> int:
    """Return a number of 63 bits that stands for a custom_id, as its seed does."""
    return int.from_bytes(sha256(custom_id.encode("utf-8", "surrogatepass")).digest()[:8]) >> 1


class Input:
    """The lines of a batch; an index counts those that are not blank.

    Raises `OptionError` for a file that cannot be read or has no line.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.numbers, self._starts = array("q"), array("q")  # in the file, from 1; bytes before it
        self._names, self._lengths = array("q"), array("q")
        try:
            if path.exists() and not path.is_file():
                raise OptionError(f"{path} is not a regular file; give a file of requests")
            self._file: IO[bytes] = open(path, "rb")
            self._scan()
        except OSError as error:
            raise OptionError(f"cannot read {path}: {error.strerror}; give a file") from None
        if not self.numbers:
            raise OptionError(f"{path} has no requests; give a file with one a line")
        self._again = self._repeated()

    def __len__(self) -> int:
        return len(self.numbers)

    def _scan(self) -> None:
        """Note where the lines begin, who they are and how much work they may be."""
        digest, number, start = sha256(), 0, 0
        while piece := self._file.readline(LINE_BYTES + 1):
            line, size, number = piece, 0, number + 1
            while piece:
                digest.update(piece)
                size += len(piece)
                piece = b"" if piece.endswith(b"\n") else self._file.readline(LINE_BYTES + 1)
            if line.strip():
                found = loosely(line)
                self.numbers.append(number)
                self._starts.append(start)
                self._names.append(name_of(found, number))
                self._lengths.append(len(line) // PROMPT_BYTES + tokens_in(found))
            start += size
        self.sha256 = digest.hexdigest()

    def _repeated(self) -> set[int]:
        """Return the indices of lines whose custom_id an earlier line has."""
        import numpy as np

        names = np.frombuffer(self._names, np.int64)
        first = np.zeros(len(names), bool)
        first[np.unique(names, return_index=True)[1]] = True
        return set(np.flatnonzero(~first).tolist())

    def line(self, index: int) -> tuple[int, bytes, bool]:
        """Return the number of a line, its bytes, and whether its custom_id came before.

        Of a line that is too long, only a part is returned. Raises `OptionError` if the file has
        changed.
        """
        self._file.seek(self._starts[index])
        line, number = self._file.readline(LINE_BYTES + 1), self.numbers[index]
        if name_of(loosely(line), number) != self._names[index]:
            what = f"{self.path} has changed while it was read"
            raise OptionError(f"{what}; remove what was written, and begin anew")
        return number, line, index in self._again

    def index(self, number: int) -> int | None:
        """Return the index of the line with a number, None if it is blank or beyond the end."""
        place = bisect_left(self.numbers, number)
        return place if place < len(self) and self.numbers[place] == number else None

    def dealt(self, rank: int, ranks: int) -> Iterator[int]:
        """Yield the indices of the lines of one process: each gets about as much work."""
        size = max(1, min(BLOCK, len(self) // (8 * ranks)))
        loads = [0] * ranks
        for start in range(0, len(self), size):
            least = loads.index(min(loads))
            loads[least] += sum(self._lengths[start : start + size])
            if least == rank:
                yield from range(start, min(start + size, len(self)))


def loosely(line: bytes) -> Any:
    """Return what a line has, None for anything but JSON."""
    try:
        return json.loads(line.removeprefix(MARK))
    except (ValueError, RecursionError):
        return None


def name_of(found: Any, number: int) -> int:
    """Return the number of a line's custom_id, or one for its place in the file."""
    custom_id = found.get("custom_id") if isinstance(found, dict) else None
    return number_of(custom_id) if isinstance(custom_id, str) else -number


def tokens_in(found: Any) -> int:
    """Return how many tokens the answers to a line may have."""
    body = found.get("body") if isinstance(found, dict) else None
    if not isinstance(body, dict):
        return 0
    limits = *(body.get(name) for name in LIMITS), USUAL_TOKENS
    limit = next(one for one in limits if type(one) is int)
    count = body.get("n")
    return min(max(limit * (count if type(count) is int else 1), 0), 1 << 20)


class Stored(NamedTuple):
    """An answer in a part: the index of its line, the place in the part, and the status."""

    line: int
    start: int
    status: int


class Part:
    """A file of answers as they ended, after one line about the batch, its head."""

    def __init__(self, path: Path, mode: str) -> None:
        self.path, self.file = path, open(path, mode, buffering=1 << 16)
        self.end = 0  # of the last line that is whole

    def read(self, head: dict[str, Any], source: Input) -> Iterator[Stored]:
        """Yield the answers up to the first line that is not whole, which a kill may leave.

        Raises `OptionError` if the part belongs to another batch.
        """
        self.file.seek(0)
        while (line := self.file.readline()).endswith(b"\n"):
            found = loosely(line)
            if self.end == 0:
                self._check(head, found)
            else:
                stored = self._stored(found, source)
                if stored is None:
                    return
                yield stored
            self.end += len(line)

    def _check(self, head: dict[str, Any], found: Any) -> None:
        found = found if isinstance(found, dict) else {}
        if differing := [name for name in head if found.get(name) != head[name]]:
            what = f"{self.path} was begun with another {' and '.join(differing)}"
            raise OptionError(f"{what}; give the same, another -o, or remove it")

    def _stored(self, found: Any, source: Input) -> Stored | None:
        try:
            index = source.index(int(found["id"].removeprefix(ID)))
            status = int(found["response"]["status_code"])
        except (TypeError, KeyError, ValueError, AttributeError):
            return None
        return None if index is None else Stored(index, self.end, status)


class Output:
    """Answers on their way to the file `target`.

    `head` says what the answers depend on. Raises `OptionError` if a part belongs to another batch,
    or another process adds to it.
    """

    def __init__(self, target: Path, source: Input, head: dict[str, Any], rank: int) -> None:
        self.target, self.source, self.head = target, source, head
        path = part_of(target, rank)
        path.touch()
        self.own = Part(path, "r+b")
        only(self.own)
        self.done = bytearray(len(source))  # 1 for each line that has an answer
        self.failed = 0  # of them
        for part in self._parts():
            for index, _, status in part.read(head, source):
                self.failed += status != 200 and not self.done[index]
                self.done[index] = 1
            if part is not self.own:
                part.file.close()
        self.own.file.seek(self.own.end)
        self.own.file.truncate()
        self._synced = time.monotonic()
        if self.own.end == 0:
            self._write([json.dumps(head)])

    def _parts(self) -> list[Part]:
        """Return this process's part, and those of others that are there."""
        parts = [self.own]
        for path in parts_of(self.target):
            if path != self.own.path and path.exists():
                parts.append(Part(path, "rb"))
        return parts

    def add(self, lines: list[str]) -> None:
        """Append answers; a kill from now on loses none of them."""
        if lines:
            self._write(lines)

    def _write(self, lines: list[str]) -> None:
        self.own.file.write("".join(f"{line}\n" for line in lines).encode())
        self.own.file.flush()
        if time.monotonic() - self._synced > SYNC_SECONDS:
            self.sync()

    def sync(self) -> None:
        """Wait until the answers are on the disk."""
        os.fsync(self.own.file.fileno())
        self._synced = time.monotonic()

    def join(self) -> tuple[int, int] | None:
        """Write the target, in the order of the input, and remove the parts.

        Return the numbers of answers and of errors among them; None if lines are missing, which
        other processes may be running.
        """
        self.sync()
        parts, count, failed = self._parts(), len(self.source), 0
        owners, starts = array("i", [-1]) * count, array("q", [0]) * count
        for place, part in enumerate(parts):
            part.end = 0
            for index, start, status in part.read(self.head, self.source):
                failed += status != 200 and owners[index] < 0
                if owners[index] < 0:
                    owners[index], starts[index] = place, start
        if -1 in owners:
            return None
        with replacing(self.target) as new, open(new, "wb") as file:
            for owner, start in zip(owners, starts, strict=True):
                parts[owner].file.seek(start)
                file.write(parts[owner].file.readline())
            file.flush()
            os.fsync(file.fileno())
        self.close()
        remove_parts(self.target)
        return count, failed

    def close(self) -> None:
        self.own.file.close()


def only(part: Part) -> None:
    """Raise `OptionError` if another process writes to a part."""
    try:
        fcntl.flock(part.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        what = f"another process is writing {part.path}"
        raise OptionError(f"{what}; wait for it, or give another -o") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise


def part_of(target: Path, rank: int) -> Path:
    """Return where a process puts its answers until all are there."""
    return target.with_name(f"{target.name}.part-{rank}")


def parts_of(target: Path) -> list[Path]:
    """Return the parts that are there."""
    found = glob.glob(f"{glob.escape(str(target))}.part-*")
    return sorted(Path(name) for name in found if name.rpartition("-")[2].isdecimal())


def remove_parts(target: Path) -> None:
    """Remove the parts of a target that is whole."""
    for path in parts_of(target):
        path.unlink(missing_ok=True)


def mark_of(head: dict[str, Any]) -> str:
    """Return what the `request_id` of each answer begins with: it stands for the batch."""
    return f"batch_{sha256(json.dumps(head).encode()).hexdigest()[:16]}_"


def answers_in(target: Path, source: Input, mark: str | None = None) -> tuple[int, int] | None:
    """Return how many answers a finished target has, and how many are errors.

    None if there is no such file. Raises `OptionError` if it has anything else than an answer to
    each line, or those of another batch than the one with this mark.
    """
    if not target.exists() or not target.stat().st_size:
        return None
    failed = 0
    with open(target, "rb") as file:
        for number in source.numbers:
            status = status_of(loosely(file.readline()), number, mark)
            if status is None:
                break
            failed += status != 200
        else:
            if not file.readline():
                return len(source), failed
    what = f"{target} exists, and is not what this model with these options answers to"
    raise OptionError(f"{what} {source.path}; give another -o, or remove it")


def status_of(found: Any, number: int, mark: str | None) -> int | None:
    """Return the status of an answer, None if it is not one to this line."""
    response = found.get("response") if isinstance(found, dict) else None
    if not isinstance(response, dict) or found.get("id") != f"{ID}{number}":
        return None
    if mark is not None and response.get("request_id") != f"{mark}{number}":
        return None
    status = response.get("status_code")
    return status if isinstance(status, int) else None
