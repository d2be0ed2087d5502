"""Mutants of files, and what must hold when one is read.

OPENELM_FUZZ=2000 makes every test search long, with 2,000 new mutants; else they are the same ones.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from formats import again, everything, random_folder
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from openelm_mlx import load
from openelm_mlx.cli.inspect import inspect
from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.device import mx
from openelm_mlx.errors import OpenELMError

LONG = os.environ.get("OPENELM_FUZZ")
FUZZ = settings(
    max_examples=int(LONG or 60),
    deadline=None,
    derandomize=LONG is None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
TOKENS = mx.array([[1, 5, 9, 30]])
SCRATCH = Path(tempfile.gettempdir()) / f"openelm-fuzz-{os.getpid()}"  # made by the fixture


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=8,
)


@pytest.fixture(autouse=True, scope="module")
def scratch() -> Iterator[Path]:
    """The folder of all files. What can only be converted goes into a cache there."""
    SCRATCH.mkdir(exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENELM_CACHE", str(SCRATCH / "cache"))
        yield SCRATCH
    shutil.rmtree(SCRATCH, ignore_errors=True)


def tiny_folder() -> Path:
    folder = SCRATCH / "tiny"
    return folder if folder.exists() else random_folder(folder)


def made(name: str, **fields) -> Path:
    target = SCRATCH / name
    if not target.exists():
        convert(ConvertOptions(source=tiny_folder(), target=target, **fields))
    return target


def damage() -> st.SearchStrategy:
    """What to do to the bytes of a file: (position as a share, bytes to put there or number to cut
    or repeat).
    """
    share = st.floats(0, 1, allow_nan=False)
    flips = st.lists(st.tuples(share, st.binary(min_size=1, max_size=9)), min_size=1, max_size=4)
    return st.one_of(
        st.tuples(st.just("flip"), flips),
        st.tuples(st.just("cut"), share),
        st.tuples(st.just("insert"), share, st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("all"), st.binary(max_size=200)),
    )


def damaged(data: bytes, change, span: int) -> bytes:
    """`data` with the change applied within its first (or, for a negative span, last) `span`
    bytes.
    """
    begin, width = (
        (0, min(span, len(data))) if span > 0 else (max(len(data) + span, 0), min(-span, len(data)))
    )

    def at(share: float) -> int:
        return begin + int(share * (width - 1))

    if change[0] == "cut":
        return data[: at(change[1])]
    if change[0] == "insert":
        return data[: at(change[1])] + change[2] + data[at(change[1]) :]
    if change[0] == "all":
        return change[1]
    result = bytearray(data)
    for share, new in change[1]:
        result[at(share) : at(share) + len(new)] = new
    return bytes(result)


@contextmanager
def assert_survival(*names: str) -> Iterator[None]:
    """The block succeeds, or fails with a one-line error of this project that names the file."""
    start = time.perf_counter()
    try:
        yield
    except OpenELMError as error:
        text = str(error)
        assert any(name in text for name in names), text
        assert len(text) < 5000
    assert time.perf_counter() - start < 20


def assert_read_alike(folder: Path) -> None:
    """The folder is converted and loaded, to the same logits, or neither; what is loaded is
    inspected too.
    """
    done = {"convert": False, "load": False, "inspect": False}
    logits = []
    with assert_survival(str(folder)):
        everything(folder)
        logits.append(load(again(folder, SCRATCH / "again", force=True)).model(TOKENS))
        done["convert"] = True
    with assert_survival(str(folder)):
        logits.append(load(folder).model(TOKENS))
        done["load"] = True
    with assert_survival(str(folder)):
        inspect(str(folder))
        done["inspect"] = True
    assert done["convert"] == done["load"] <= done["inspect"], done
    assert len(logits) != 2 or mx.array_equal(*logits, equal_nan=True), folder


def damaged_folder(kind: str, original: Path, file: str, change, span: int) -> Path:
    """A copy of a model folder with the change applied to one of its files."""
    folder = SCRATCH / f"damaged-{kind}"
    folder.mkdir(exist_ok=True)
    for path in original.iterdir():
        if path.is_file() and path.name in (
            "model.safetensors",
            "config.json",
            "tokenizer.model",
            "weights.safetensors",
        ):
            data = path.read_bytes()
            (folder / path.name).write_bytes(
                damaged(data, change, span) if path.name == file else data
            )
    return folder
