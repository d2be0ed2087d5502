"""The check of our kernels on this very GPU, the first time that one of them could run.

Nobody here has every GPU, so each kernel is compared with its twin on small inputs before it is
used (`kernel.check_of`). The verdicts are kept in a file of our cache folder, for this device and
system, MLX's version and the text of all kernels; when any of them changes, or the file is gone or
damaged, the kernels are checked again. Nothing here raises: a kernel that differs or fails is not
used, and its twin computes the same values.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from openelm_mlx.device import kind, mx
from openelm_mlx.errors import reason
from openelm_mlx.files import cache_folder, read_own_json, write_json

# Stands in the file while a check runs, with the process and how often it was begun: a GPU's fault
# ends the process, and must not do so again and again; a user may have ended the first one.
UNFINISHED = "its check did not end"
ATTEMPTS = 2
UNITS = 2  # of the last place of the largest value: sums of another order may differ by so much

Check = Callable[[str], str]  # from the name of a kernel to how it differs from its twin, or ""


def difference(mine: Sequence[mx.array], twin: Sequence[mx.array]) -> str:
    """Return how a kernel's outputs differ from its twin's, "" if they agree.

    Floats may differ by `UNITS` of the last place of the twin's largest value; an infinite one must
    be the same. Integers and booleans must be equal.
    """
    for number, (a, b) in enumerate(zip(mine, twin, strict=True)):
        where = f"output {number}" if len(twin) > 1 else "its output"
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"{where} is {a.dtype} {a.shape}, its twin's {b.dtype} {b.shape}"
        if not mx.issubdtype(b.dtype, mx.floating):
            if count := int((a != b).sum()):
                return f"{where} differs from its twin's at {count} of {b.size} places"
            continue
        allowed = UNITS * mx.finfo(b.dtype).eps
        a, b = a.astype(mx.float32), b.astype(mx.float32)
        finite = mx.isfinite(b)
        if not mx.all(mx.where(finite, mx.isfinite(a), a == b)).item():
            return f"{where} is infinite or not a number where its twin's is not"
        largest = float(mx.where(finite, mx.abs(b), 0).max())
        gap = float(mx.where(finite, mx.abs(a - b), 0).max())
        if gap > allowed * largest:
            return (
                f"{where} differs from its twin's by {gap:.2g}, the largest value is {largest:.2g}"
            )
    return ""


def noise(seed: int, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """Return normal random inputs of a check, which leave the state of random numbers alone."""
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def wrong_kernels(
    names: Iterable[str], check: Check, about: dict[str, str] | None = None
) -> dict[str, str]:
    """Return why the kernels that cannot be used here cannot, by name; never raise.

    Those without a verdict in the memory are checked first. `about` is by default `subject()`.
    """
    about = subject() if about is None else about
    verdicts = remembered(about)
    for name in names:
        attempt = next_attempt(verdicts.get(name))
        if attempt is None:
            continue
        remember(about, name, f"{UNFINISHED} (process {os.getpid()}, attempt {attempt})")
        try:
            verdicts[name] = check(name)
        except Exception as error:  # whatever it is, the twin does without
            verdicts[name] = f"its check failed: {reason(error)}"
        except BaseException:  # an interrupt says nothing of the kernel, so it is checked again
            remember(about, name, None)
            raise
        remember(about, name, verdicts[name])
    return {name: verdicts[name] for name in names if verdicts[name]}


def next_attempt(verdict: str | None) -> int | None:
    """Return the number of the next attempt to check a kernel with this verdict, None if it counts.

    While the process that began a check still runs, its verdict says nothing, and another process
    checks beside it: compiling may be slow.
    """
    if verdict is None:
        return 1
    begun = re.fullmatch(rf"{UNFINISHED} \(process (\d+), attempt (\d+)\)", verdict)
    if begun is None:
        return None
    attempt = int(begun[2])
    if runs(int(begun[1])):
        return attempt
    return attempt + 1 if attempt < ATTEMPTS else None


def runs(process: int) -> bool:
    """Return whether a process of this number runs."""
    try:
        os.kill(process, 0)
    except PermissionError:  # another user's
        return True
    except (OSError, OverflowError):
        return False
    return True


# --- the memory of verdicts


def subject() -> dict[str, str]:
    """Return what a verdict is about: the device, its system, MLX, and the text of all kernels."""
    device = mx.device_info()
    texts = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    return {
        "device": " ".join(str(device.get(k, "")) for k in ("device_name", "architecture")).strip(),
        "system": f"{platform.system()} {platform.mac_ver()[0] or platform.release()}",
        "backend": kind(),
        "mlx": str(mx.__version__),  # type: ignore[attr-defined]
        "kernels": hashlib.sha256(b"\0".join(texts)).hexdigest(),
    }


def memory_path(about: dict[str, str]) -> Path:
    """Return the file of a device. Two machines may share a home, so each has a file of its own."""
    name = hashlib.sha256(f"{about['backend']} {about['device']}".encode()).hexdigest()
    return cache_folder() / "kernels" / f"{name[:16]}.json"


def remembered(about: dict[str, str]) -> dict[str, str]:
    """Return the verdicts that hold for `about`, none if there is no file or it is damaged."""
    found = read_own_json(memory_path(about))
    verdicts = found.get("verdicts")
    if found.get("about") != about or not isinstance(verdicts, dict):
        return {}
    return {name: why for name, why in verdicts.items() if isinstance(why, str)}


def remember(about: dict[str, str], name: str, verdict: str | None) -> None:
    """Write a verdict beside those in the file, which another process may just have written.

    None takes one back. A folder that cannot be written only costs a check in each process.
    """
    with contextlib.suppress(OSError):
        path = memory_path(about)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"about": about, "verdicts": remembered(about) | {name: verdict}})


def forget() -> None:
    """Remove the verdicts on this device, so that the next use checks again.

    A check that did not end in any attempt is not made again: if the process ended with it, so
    would this one, which may be there to tell what is wrong.
    """
    about = subject()
    unfinished = {
        name: why
        for name, why in remembered(about).items()
        if why.startswith(UNFINISHED) and next_attempt(why) is None
    }
    with contextlib.suppress(OSError):
        memory_path(about).unlink(missing_ok=True)
    for name, why in unfinished.items():
        remember(about, name, why)
