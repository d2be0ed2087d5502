"""Answers that are kept while an evaluation runs, so that the same command goes on after a kill.

    ~/.cache/openelm-mlx/answers/   (~/Library/Caches on macOS; $OPENELM_CACHE moves it)
      1a2b3c4d5e6f7a8b-0.sqlite     named for what the numbers depend on; one file for each process
      1a2b3c4d5e6f7a8b-0.lock       locked by the process that writes it

A pass of the model is a row, and each row a transaction: SIGKILL loses none that has ended, and a
power cut those of the last seconds. A pass is known by what it is asked, so another command may
find its answers too. A file that cannot be used costs the comfort only: the evaluation goes on.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import sqlite3
import sys
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Self

from openelm_mlx import __version__, device
from openelm_mlx.engine.model_cache import same_file
from openelm_mlx.engine.threads import device_work
from openelm_mlx.files import cache_folder

if TYPE_CHECKING:
    from openelm_mlx.engine.loading import Engine

FORMAT = "openelm-mlx answers 1"
KEPT_DAYS = 30.0  # that the answers of a run which never goes on stay
SYNC_SECONDS = 5.0  # a power cut loses the answers of this time at most
DAMAGED = (sqlite3.SQLITE_ERROR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
TABLES = """
CREATE TABLE about (identity TEXT NOT NULL);
CREATE TABLE passes (key TEXT PRIMARY KEY, answers TEXT NOT NULL, digest TEXT NOT NULL);
"""


class Store:
    """The answers of passes, by the key of the pass, in the cache folder.

    `batch_tokens` is what the passes are planned for. It may be opened by several processes at
    once; each adds to a file of its own, and reads those that are there. Where nothing can be
    written, it says so in one line on standard error, and holds the answers in memory.
    """

    def __init__(self, engine: Engine, batch_tokens: int) -> None:
        self.identity, self.folder = identity(engine, batch_tokens), answers_folder()
        text = json.dumps(self.identity, sort_keys=True)
        self._stem, self._text = hashlib.sha256(text.encode()).hexdigest()[:16], text
        self._known: dict[str, str] = {}
        self._lock: IO[str] | None = None
        self._file: sqlite3.Connection | None = None
        self._synced = time.monotonic()
        try:
            self._open()
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def get(self, key: str) -> list[Any] | None:
        """Return the answers to a pass, None if there are none."""
        return None if (text := self._known.get(key)) is None else list(json.loads(text))

    def add(self, key: str, answers: list[Any]) -> None:
        """Keep the answers to a pass: from now on a kill does not lose them."""
        self._known[key] = text = json.dumps(answers)
        if self._file is None:
            return
        try:
            with self._file:
                row = (key, text, digest_of(key, text))
                self._file.execute("INSERT OR REPLACE INTO passes VALUES (?, ?, ?)", row)
            if time.monotonic() - self._synced > SYNC_SECONDS:
                self._file.execute("PRAGMA wal_checkpoint")
                self._synced = time.monotonic()
        except sqlite3.Error as error:
            self._give_up(error)

    def close(self) -> None:
        """Leave the file to the next run."""
        if self._file is not None:
            with contextlib.suppress(sqlite3.Error):
                self._file.close()
        if self._lock is not None:
            self._lock.close()
        self._file = self._lock = None

    def finish(self) -> None:
        """Remove the files, as the results are written; those that other processes use stay."""
        self.close()
        for path in self.folder.glob(f"{self._stem}-*.lock"):
            remove(path)

    def _open(self) -> None:
        """Take the first file that no process writes, and read all."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("*.lock"):
            if path.stat().st_mtime < time.time() - KEPT_DAYS * 86400:
                remove(path)
        paths = (self.folder / f"{self._stem}-{number}.lock" for number in count())
        self._lock = next(lock for path in paths if (lock := locked(path)) is not None)
        own = Path(self._lock.name).with_suffix(".sqlite")
        for path in self.folder.glob(f"{self._stem}-*.sqlite"):
            try:
                self._read(path)
            except sqlite3.Error as error:  # or it is removed, as another process has just ended
                if getattr(error, "sqlite_errorcode", 1) & 0xFF in DAMAGED:
                    self._set_aside(path, path == own)
        self._file = connect(own)
        if not self._file.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
            self._file.executescript(f"BEGIN; {TABLES}")
            self._file.execute("INSERT INTO about VALUES (?)", (self._text,))
            self._file.commit()

    def _read(self, path: Path) -> None:
        """Read the answers in a file. Raises `sqlite3.Error` if it has anything else."""
        with contextlib.closing(connect(path, "rw")) as file:
            if not file.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                return  # it was killed before it began
            if file.execute("SELECT identity FROM about").fetchall() != [(self._text,)]:
                raise sqlite3.DatabaseError("it is of another evaluation")
            rows = file.execute("SELECT key, answers, digest FROM passes").fetchall()
        for key, text, digest in rows:
            if digest_of(key, text) != digest:
                raise sqlite3.DatabaseError("an answer has changed")
            self._known[key] = text

    def _set_aside(self, path: Path, ours: bool) -> None:
        """Give a damaged file another name, unless another process writes it."""
        said = "another process uses it; its answers are left out"
        if ours:
            said = "it is set aside, as .damaged"
            os.replace(path, path.with_suffix(".damaged"))
            for name in journals(path):
                name.unlink(missing_ok=True)
        print(f"openelm: {path} is damaged, and {said}", file=sys.stderr)

    def _give_up(self, error: Exception) -> None:
        self.close()
        why = getattr(error, "strerror", None) or str(error)
        what = (
            f"answers cannot be kept in {self.folder} ({why}), so a run that is stopped starts anew"
        )
        remedy = "make room there, or set OPENELM_CACHE to another folder"
        print(f"openelm: {what}; {remedy}", file=sys.stderr)


@device_work
def identity(engine: Engine, batch_tokens: int) -> dict[str, Any]:
    """Return what the numbers depend on, apart from what is asked."""
    from openelm_mlx.engine.prompt_cache import fingerprint  # `openelm models` does not need it

    facts = device.facts()
    return {
        "format": FORMAT,
        "version": __version__,
        "weights": fingerprint(engine),
        "batch_tokens": batch_tokens,
        "mlx": facts["mlx"],
        "device": "cpu" if device.on_processor() else facts["backend"],
        **{name: facts[name] for name in ("chip", "blas")},
        **{name: os.environ.get(name) for name in ("OPENELM_KERNELS", "MLX_ENABLE_TF32")},
    }


def answers_folder() -> Path:
    """Return where the answers of all evaluations are kept that have not ended."""
    return cache_folder() / "answers"


def connect(path: Path, mode: str = "rwc") -> sqlite3.Connection:
    """Open a file; one that it makes (c) is of a kind which no kill or power cut damages."""
    name = f"{path.absolute().as_uri()}?mode={mode}"
    file = sqlite3.connect(name, uri=True, check_same_thread=False)
    if "c" in mode:
        for setting in ("journal_mode=WAL", "synchronous=NORMAL", "checkpoint_fullfsync=ON"):
            file.execute(f"PRAGMA {setting}")
    return file


def digest_of(key: str, text: str) -> str:
    """Return what tells that neither a key nor its answers have changed on the disk."""
    return hashlib.sha256(f"{key} {text}".encode()).hexdigest()[:16]


def journals(path: Path) -> Iterator[Path]:
    """Yield the names of what SQLite writes beside a file."""
    return (path.with_name(f"{path.name}{end}") for end in ("-wal", "-shm", "-journal"))


def locked(path: Path) -> IO[str] | None:
    """Return a file, locked by this process until it is closed; None if another has locked it."""
    while True:
        file = open(path, "a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.close()
            if isinstance(error, BlockingIOError):
                return None
            raise
        if same_file(file, path):
            os.utime(path)
            return file
        file.close()  # another process has just removed it


def remove(path: Path) -> None:
    """Remove a lock and what it guards, unless a process has locked it."""
    with contextlib.suppress(OSError):
        if (lock := locked(path)) is not None:
            with lock:
                file = path.with_suffix(".sqlite")
                for name in (file, *journals(file), path.with_suffix(".damaged"), path):
                    name.unlink(missing_ok=True)
