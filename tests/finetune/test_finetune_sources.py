"""Files, folders and datasets as sources of records, and what is said of those that are none."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest
from optional import hide

from openelm_mlx.errors import FinetuneError, OpenELMError
from openelm_mlx.finetune import sources
from openelm_mlx.finetune.sources import dataset_of, raw_records

ROWS = [{"prompt": f"Number {number}?", "completion": "Yes."} for number in range(3)]


def places(source: Any) -> list[str]:
    return [place for place, _ in raw_records(source)]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "missing.jsonl",
            None,
            "missing.jsonl does not exist; give a JSONL or text file, a folder",
        ),
        ("binary.txt", b"a\0b", "binary.txt is no text: it has zero bytes"),
        ("latin.txt", b"caf\xe9", "latin.txt cannot be read as UTF-8 text: byte 3 is not UTF-8"),
        ("image.png", b"\x89PNG", "image.png cannot be read as UTF-8 text: byte 0 is not UTF-8"),
        ("bad.json", b"[1,", "bad.json cannot be read as a JSON array: Expecting value"),
    ],
)
def test_a_file_that_is_no_source_is_refused(tmp_path: Path, name: str, content: Any, said: str):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(OpenELMError, match=said):
        places(tmp_path / name)


def test_what_is_not_written_in_utf8_is_told_with_what_to_do(tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    text = '{"text": "Once"}\n'
    for content, said in {
        text.encode("utf-16"): "is UTF-16; convert it to UTF-8, for example with iconv",
        gzip.compress(text.encode()): "is compressed; unpack it with gunzip",
    }.items():
        path.write_bytes(content)
        with pytest.raises(FinetuneError) as caught:
            places(path)
        assert str(caught.value) == f"{path} {said}"


def test_what_is_no_file_is_refused(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for name, said in {
        str(tmp_path / "pipe"): "is not a regular file",
        f"{tmp_path}/pipe:a:b": "does not exist",
        "no-such-file": "no-such-file does not exist; give .* as owner/name",
        "": "the name of the data is empty; give a JSONL or text file",
        "owner/name:": "does not exist",
        "owner/name:a:b:c": "does not exist",
        "owner/pairs.jsonl": "does not exist",
        f"{tmp_path.name}/data": "does not exist",
    }.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path.parent)
            with pytest.raises(FinetuneError, match=said):
                places(name)


@pytest.mark.needs("another user than root")
def test_a_protected_file_is_refused(tmp_path: Path):
    path = tmp_path / "own.jsonl"
    path.touch(0o000)
    with pytest.raises(FinetuneError, match="own.jsonl cannot be read: Permission denied"):
        places(path)


def test_sizes_beyond_sense_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "MAX_LINE", 100)
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" + b" " * 99 + b"\n" + b" " * 101)
    with pytest.raises(FinetuneError, match="a.jsonl, line 3 has more than 0 MiB"):
        places(tmp_path / "a.jsonl")
    monkeypatch.setattr(sources, "MAX_TEXT_BYTES", 100)
    (tmp_path / "a.json").write_bytes(b"[" + b" " * 100 + b"]")
    with pytest.raises(FinetuneError, match="is an array of more than 0 MiB; write one object a"):
        places(tmp_path / "a.json")


def test_a_path_may_begin_with_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.jsonl").write_bytes(b"{}\n")
    assert places("~/a.jsonl") == ["line 1"]


def test_names_of_datasets():
    here = Path("nowhere")
    assert dataset_of("owner/name", here) == ("owner/name", {}, "train")
    assert dataset_of("owner/name:test[:9]", here) == ("owner/name", {}, "test[:9]")
    assert dataset_of("o/n:sub:test[1:2]", here) == ("o/n", {"name": "sub"}, "test[1:2]")


def test_the_library_of_datasets_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch):
    hide(monkeypatch, "datasets")
    said = r"owner/name is read by .* not installed; pip install 'openelm-mlx\[finetune\]'"
    with pytest.raises(FinetuneError, match=said):
        places("owner/name")


@pytest.mark.needs("datasets")
def test_tables_and_folders_are_read(tmp_path: Path):
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path / "tables"
    folder.mkdir()
    lines = "".join(f"{json.dumps(row)}\n" for row in ROWS)
    (folder / "train.jsonl").write_text(lines)
    (folder / "test.jsonl").write_text(lines.splitlines()[1])
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text(
        "".join(f"{a},{b}\n" for a, b in [ROWS[0], *map(dict.values, ROWS)])
    )
    expected = [(f"row {number}", row) for number, row in enumerate(ROWS)]
    for source in (folder, tmp_path / "a.parquet", tmp_path / "a.csv"):
        assert list(raw_records(source)) == expected
    assert list(raw_records(f"{folder}:test")) == [("row 0", ROWS[1])]
    said = "tables cannot be read as a dataset with a split 'dev': Bad split: dev. Available"
    with pytest.raises(FinetuneError, match=said) as caught:
        places(f"{folder}:dev")
    end = f"; check what is in it, or give another split as {folder}:SPLIT"
    assert str(caught.value).endswith(end)
    (tmp_path / "a.parquet").write_bytes(b"PAR1 is not enough")
    with pytest.raises(FinetuneError, match="a.parquet cannot be read as a dataset .*; check w"):
        places(tmp_path / "a.parquet")


@pytest.mark.needs("datasets")
def test_a_dataset_that_cannot_be_reached_is_named(monkeypatch: pytest.MonkeyPatch):
    import datasets
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(FinetuneError) as caught:
        places("nobody/nothing:dev")
    text = str(caught.value)
    assert text.startswith("nobody/nothing cannot be read as a dataset with a split 'dev': ")
    assert text.endswith(
        "; check the name and the network, or give another split as nobody/nothing:SPLIT"
    )
