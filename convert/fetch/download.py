"""A large file over HTTP: a lost connection loses no bytes, and a file that changed is refused.

A download goes to `NAME.part`, with the server's description of the file in `NAME.part.json`. The
next attempt, or the next run, goes on from there if the server still offers the same file. A
complete download is recorded in `NAME.record.json` (address, size, SHA-256), and every later use is
checked against that.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import http.client
import os
import re
import shutil
import socket
import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from openelm_mlx.engine.hub import CERTIFICATE_REMEDY
from openelm_mlx.errors import HubError, OpenELMError, reason
from openelm_mlx.files import read_own_json, write_json

# called with the bytes here, the bytes in all (None: unknown), and the file's name
Progress = Callable[[int, int | None, str], None]
CHUNK = 1 << 20
MAX_BYTES = 1 << 38  # 274 GB; the 3B's training checkpoints have three numbers a weight, 36 GB
TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 6  # in a row that bring nothing new
UNREACHABLE = (socket.gaierror, ConnectionRefusedError, ssl.SSLCertVerificationError)
CONTENT_RANGE = r"bytes (\d{1,18})-\d{1,18}/(\d{1,18})"
DISK_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)


@dataclass
class Offer:
    """A server's description of a file; None if it does not say."""

    size: int | None
    tag: str | None  # it changes with the content


class SameScheme(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http(s) only, and never from https to http."""

    def redirect_request(
        self, req: Any, fp: Any, code: int, msg: str, headers: http.client.HTTPMessage, newurl: str
    ) -> Any:
        allowed = ("https://", "http://") if req.full_url.startswith("http://") else ("https://",)
        if not newurl.startswith(allowed):
            raise HubError(
                f"{req.full_url} redirects to {newurl[:200]}, which is not a safe address; not "
                "followed"
            )
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def fetch(
    url: str,
    target: Path,
    progress: Progress | None = None,
    inspect: Callable[[Path], object] | None = None,
    timeout: float = TIMEOUT,
    wait: Callable[[float], None] = time.sleep,
) -> Path:
    """Make `target` the file at `url`, downloaded now or before. Raises `HubError`.

    A file for which `inspect` raises an `OpenELMError` is not kept. `timeout` is in seconds without
    a byte; `wait` is called with the seconds between attempts.
    """
    progress = progress or (lambda done, total, name: None)
    record = target.with_name(f"{target.name}.record.json")
    recorded = read_record(record)
    if target.is_file() and recorded is not None:
        check(target, recorded, progress)
        return target
    part = target.with_name(f"{target.name}.part")
    with open(part, "ab+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise HubError(
                f"{part} is being downloaded by another process; wait for it to end"
            ) from None
        digest = Download(url, target, file, progress, timeout, wait).run()
        file.flush()
        os.fsync(file.fileno())
        found = {"url": url, "size": file.tell(), "sha256": digest}
        if recorded is not None and any(recorded[key] != found[key] for key in ("size", "sha256")):
            file.truncate(0)
            raise HubError(
                f"{url} is not the file it was: {found['size']} bytes with SHA-256 {digest}, at "
                f"the first download {recorded['size']} bytes with {recorded['sha256']}; if it was "
                f"replaced on purpose, delete {record}"
            )
        if inspect is not None:
            try:
                inspect(part)
            except OpenELMError as error:
                file.truncate(0)
                raise HubError(f"what {url} sent is not kept: {error}") from None
        write_json(record, found)
        os.replace(part, target)
    state_of(part).unlink(missing_ok=True)
    return target


@dataclass
class Download:
    """A download in progress. Attempts go on until it is complete, or several in a row brought
    nothing.
    """

    url: str
    target: Path
    file: IO[bytes]
    progress: Progress
    timeout: float
    wait: Callable[[float], None]

    def __post_init__(self) -> None:
        self.state = state_of(Path(self.file.name))
        self.offer, self.restarts, self.reached = read_offer(self.state), 0, False
        self.opener = urllib.request.build_opener(SameScheme)

    def run(self) -> str:
        """Return the SHA-256 of the complete file, which ends at the file's position."""
        fruitless, problem = 0, ""
        while max(fruitless, self.restarts) < ATTEMPTS:
            if fruitless:
                seconds = min(2.0**fruitless, 30.0)
                again = f"attempt {fruitless + 1} of {ATTEMPTS} in {seconds:.0f} s"
                print(f"openelm: {self.url}: {problem}; {again}", file=sys.stderr)
                self.wait(seconds)
            before = self.file.seek(0, os.SEEK_END)
            try:
                if self.attempt(before):
                    return file_hash(self.file)
                ended = f"{self.file.tell()} of {self.offer.size} bytes"
                problem = f"the connection ended after {ended}"
            except urllib.error.HTTPError as error:
                self.reached = True
                problem = problem if error.code == 416 and problem else f"HTTP {error.code}"
                if error.code not in (408, 416, 425, 429) and error.code < 500:
                    raise HubError(f"cannot fetch {self.url}: {problem}") from None
                if error.code == 416:  # what is here is longer than what is there
                    self.start_over()
            except (OSError, http.client.HTTPException) as error:
                if getattr(error, "errno", None) in DISK_FULL:
                    raise
                cause = getattr(error, "reason", error)  # urllib wraps what went wrong
                problem = reason(cause if isinstance(cause, Exception) else error)
                if not self.reached and isinstance(cause, UNREACHABLE):
                    break  # it will be so in a minute, too
            fruitless = 0 if self.file.seek(0, os.SEEK_END) > before else fruitless + 1
        kept = self.file.tell()
        remedy = "check the network, try again"
        if problem.startswith("HTTP "):
            remedy = "the server cannot give the file now; try again later"
        if problem == "HTTP 429":
            remedy = "the server limits how often it may be asked; try again in some minutes"
        if kept:
            remedy = f"{kept} bytes are kept, and the same command goes on from there"
        if "CERTIFICATE_VERIFY_FAILED" in problem:
            problem, remedy = "its certificate cannot be verified", CERTIFICATE_REMEDY
        raise HubError(f"cannot fetch {self.url}: {problem}; {remedy}")

    def attempt(self, start: int) -> bool:
        """Ask for what is missing and write what comes. Return whether the file is complete."""
        headers = {"User-Agent": "openelm-mlx", "Accept-Encoding": "identity"}
        if start and self.offer.tag:  # without a tag nobody knows whether it is the same file
            headers |= {"Range": f"bytes={start}-", "If-Range": self.offer.tag}
        request = urllib.request.Request(self.url, headers=headers)
        with self.opener.open(request, timeout=self.timeout) as response:
            self.reached = True
            offer, begin = offered(response)
            if response.status == 206 and (begin != start or offer.size != self.offer.size):
                self.start_over()
                return False
            if response.status != 206:
                self.start_over()
            if (offer.size or 0) > MAX_BYTES:
                raise HubError(
                    f"{self.url} claims {offer.size} bytes; no published file has that many"
                )
            self.remember(Offer(offer.size, offer.tag or self.offer.tag))
            self.check_space()
            return self.receive(response)

    def receive(self, response: Any) -> bool:
        done, total = self.file.seek(0, os.SEEK_END), self.offer.size
        while block := response.read1(CHUNK):  # read() would lose what came before a stall
            done += len(block)
            if done > (MAX_BYTES if total is None else total):
                self.start_over()
                raise HubError(
                    f"{self.url} sends more than the {total} bytes it promised; not taken"
                )
            self.file.write(block)
            self.progress(done, total, self.target.name)
        self.file.flush()
        return total is None or done == total

    def start_over(self) -> None:
        had_bytes = self.file.seek(0, os.SEEK_END) > 0
        self.restarts += int(had_bytes)  # or a server could keep this going for ever
        self.file.truncate(0)
        self.remember(Offer(None, None))

    def remember(self, offer: Offer) -> None:
        self.offer = offer
        write_json(self.state, {"url": self.url, "size": offer.size, "tag": offer.tag})

    def check_space(self) -> None:
        missing = (self.offer.size or 0) - self.file.seek(0, os.SEEK_END)
        free = shutil.disk_usage(self.target.parent).free
        if missing > free:
            raise HubError(
                f"{self.target.parent} has {free} bytes free; {self.url} needs {missing} more"
            )


def offered(response: Any) -> tuple[Offer, int]:
    """Return what the server offers, and the offset of the first byte that it sends."""
    headers = response.headers
    tag = headers.get("ETag") or headers.get("Last-Modified")
    if tag is not None and tag.startswith("W/"):
        tag = None  # a weak tag does not promise the same bytes
    if response.status == 206:
        match = re.fullmatch(CONTENT_RANGE, headers.get("Content-Range", ""))
        return (Offer(int(match[2]), tag), int(match[1])) if match else (Offer(None, tag), -1)
    length = headers.get("Content-Length", "")
    return Offer(int(length) if re.fullmatch(r"\d{1,30}", length) else None, tag), 0


def check(target: Path, recorded: dict[str, Any], progress: Progress) -> None:
    """Raise `HubError` unless `target` is what its record says."""
    size = target.stat().st_size
    if size == recorded["size"]:
        progress(size, size, target.name)
        with open(target, "rb") as file:
            if file_hash(file) == recorded["sha256"]:
                return
    raise HubError(
        f"{target} is not the file that was downloaded first ({recorded['size']} bytes, SHA-256 "
        f"{recorded['sha256']}); delete it, and the same command fetches it again"
    )


def file_hash(file: IO[bytes]) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]


def state_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def read_offer(path: Path) -> Offer:
    raw = read_own_json(path)
    size, tag = raw.get("size"), raw.get("tag")
    fits = isinstance(tag, str) and tag.isprintable()
    return Offer(size if type(size) is int else None, tag if fits else None)


def read_record(path: Path) -> dict[str, Any] | None:
    raw = read_own_json(path)
    return raw if type(raw.get("size")) is int and isinstance(raw.get("sha256"), str) else None
