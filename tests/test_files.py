"""Outputs and inputs that cannot be: found before the work, by every command; and results that
outlive a failed save.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from bench_document import rich_document
from full_disk import files_of_at_most
from golden_set import NANO

from openelm_mlx import files
from openelm_mlx.benchmarks.results.document import save
from openelm_mlx.cli import main
from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.errors import ConfigError, ConversionError, OptionError
from openelm_mlx.files import (
    check_writable,
    read_json,
    read_text,
    replacing,
)

BELOW_A_FILE = "/dev/null/x.png"  # nobody can make this, not even root


# (flag, command line): the model or source does not exist either, which is told only after what is
# told here
BEFORE_THE_WORK = [
    *(
        (f"--{name}", ["benchmark", "no-such-model"])
        for name in ("output", "csv", "markdown", "plot", "report")
    ),
    ("--cache-file", ["generate", "Once", "--model", "no-such-model"]),
    ("--output", ["convert", "no-such-model"]),
    ("--output", ["convert", "corenet:270m", "--to", "gguf"]),
]


UNREADABLE = [
    ("--verify-text", ["convert", "no-such-model"], "cannot be read: No such file"),
    (
        "--calibration-text",
        ["convert", "no-such-model", "--bits", "4", "--calibrate", "gptq"],
        "cannot be read: No such file",
    ),
    ("--recipe", ["convert", "no-such-model"], "none.yaml does not exist"),
]


@pytest.mark.parametrize(
    ("flag", "words"),
    BEFORE_THE_WORK,
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_what_cannot_be_written_is_told_before_the_work(flag, words, capsys):
    assert main([*words, flag, BELOW_A_FILE]) == 2
    shown = capsys.readouterr()
    why = "/dev/null is not a folder; give another place"
    assert shown.err == f"openelm: {flag} {BELOW_A_FILE} cannot be written: {why}\n"
    assert shown.out == ""


def test_names_that_mlx_cannot_open_are_told_before_the_work(tmp_path, monkeypatch, capsys, nano):
    latin = tmp_path / os.fsdecode("caf\xe9".encode("latin-1"))
    try:
        latin.mkdir()
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    monkeypatch.chdir(latin)
    for words in (
        ["--cache-file", "kept"],
        ["--model", str(nano), "--cache-file", str(latin / "kept")],
    ):
        assert main(["generate", "Once", "--max-tokens", "1", *words]) == 2
        shown = capsys.readouterr()
        assert (
            "is not a name in UTF-8, and MLX opens no other; rename it, or its folder" in shown.err
            and shown.out == ""
        )
    shutil.copytree(nano, latin, dirs_exist_ok=True)
    assert main(["generate", "Once", "--max-tokens", "1", "--model", str(latin)]) == 2
    assert "is not a name in UTF-8" in capsys.readouterr().err
    assert (
        main(["convert", ".", "-o", "../again"]) == 0
    )  # what is read here has its own name in UTF-8
    assert (
        json.loads((tmp_path / "again" / "conversion.json").read_text(encoding="utf-8"))["source"]
        == "caf?"
    )
    assert main(["generate", "Once", "--cache-file", ""]) == 2
    assert capsys.readouterr().err == "openelm: --cache-file is empty; give a path\n"


def test_a_cache_is_an_ordinary_file(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    for name in ("/dev/null", str(tmp_path / "pipe")):
        assert main(["generate", "Once", "--max-tokens", "1", "--cache-file", name]) == 2
        assert capsys.readouterr() == (
            "",
            f"openelm: --cache-file {name} is not a regular file; give another name\n",
        )


@pytest.mark.parametrize(
    ("flag", "words", "message"), UNREADABLE, ids=[flag for flag, _, _ in UNREADABLE]
)
def test_what_cannot_be_read_is_told_before_the_work(
    flag, words, message, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    assert main([*words, "-o", "m", flag, "none.yaml"]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_a_text_that_is_too_short_is_told_before_anything_is_measured(tmp_path):
    (tmp_path / "empty.txt").touch()
    seen = []
    options = ConvertOptions(
        NANO / "checkpoint.pt", tmp_path / "m", target_bpw=4, verify_text=tmp_path / "empty.txt"
    )
    with pytest.raises(
        ConversionError, match="--verify-text .*empty.txt has no text; give another file"
    ):
        convert(options, lambda *progress: seen.append(progress))
    assert seen == []


def test_a_text_may_come_from_a_pipe(tmp_path):
    read_end, write_end = os.pipe()
    os.write(write_end, b"Once upon a time there was a fox.")
    os.close(write_end)
    report = convert(
        ConvertOptions(
            NANO / "checkpoint.pt", tmp_path / "m", verify_text=Path(f"/dev/fd/{read_end}")
        )
    )
    os.close(read_end)
    assert report.verification["tokens"] > 5


def test_why_a_file_cannot_be_written(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "there" / "new")
    for name, message in (
        ("there", "it is a folder; give the name of a file"),
        ("none/x", "its folder does not exist; make it first"),
        ("file/x", f"{tmp_path / 'file'} is not a folder"),
        ("n" * 300, "File name too long; give another place"),
    ):
        with pytest.raises(OptionError) as error:
            check_writable(tmp_path / name, "--csv")
        assert str(error.value).startswith(f"--csv {tmp_path / name} cannot be written: {message}")
    for name in ("new", "file", "link", "there/new"):
        check_writable(tmp_path / name, "--csv")
    check_writable(tmp_path / "a" / "b", "-o", folder=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "link", "there"]


@pytest.mark.needs("Linux")
def test_a_folder_in_which_nobody_can_make_a_file():
    with pytest.raises(
        OptionError, match=r"^--csv /proc/x cannot be written: .*; give another place$"
    ):
        check_writable("/proc/x", "--csv")  # root is told that it may write there


@pytest.mark.needs("another user than root")
def test_protected_files_and_folders(tmp_path):
    (tmp_path / "file").touch(0o444)
    with pytest.raises(OptionError, match="it is write-protected; give another file"):
        check_writable(tmp_path / "file", "--csv")
    (tmp_path / "closed").mkdir(0o555)
    with pytest.raises(OptionError, match="Permission denied; give another place"):
        check_writable(tmp_path / "closed" / "x", "--csv")


def test_links_devices_and_modes_stay_what_they_are(tmp_path):
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    for name in ("link", "pipe"):
        check_writable(tmp_path / name, "--csv")
        with replacing(tmp_path / name) as new:
            new.write_text("new")
    assert os.read(reader, 9) == b"new" and (tmp_path / "pipe").is_fifo()
    os.close(reader)
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "real"]
    with replacing(tmp_path / "first") as new:
        new.write_text("new")
    assert (tmp_path / "first").stat().st_mode & 0o777 == 0o644


def test_texts_that_cannot_be_read(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9")
    with pytest.raises(
        OptionError,
        match=r"--system-file .*latin cannot be read as UTF-8 text: byte 3 .* with iconv",
    ):
        read_text(tmp_path / "latin", "--system-file")
    (tmp_path / "marked").write_bytes("\ufeffä\n".encode())
    assert read_text(tmp_path / "marked", "--system-file") == "ä\n"
    with pytest.raises(
        OptionError, match=r"--system-file .* cannot be read: Is a directory; give a text file"
    ):
        read_text(tmp_path, "--system-file")


def test_a_text_without_an_end(monkeypatch):
    monkeypatch.setattr(files, "MAX_TEXT_BYTES", 1 << 20)
    message = "--verify-text /dev/zero has more than 1 MiB; give a part of it"
    with pytest.raises(OptionError, match=message):
        read_text("/dev/zero", "--verify-text")


@pytest.mark.parametrize("json_asked", [True, False])
def test_a_cache_that_cannot_be_saved_loses_no_text(json_asked, tmp_path, capsys):
    path = tmp_path / "talk.safetensors"
    words = ["generate", "Once upon a time", "--max-tokens", "3", "--cache-file", str(path)]
    with files_of_at_most(1000):
        assert main([*words, *["--json"] * json_asked]) == 2
    shown = capsys.readouterr()
    assert json.loads(shown.out)["tokens"] if json_asked else shown.out.strip()
    last = shown.err.splitlines()[-1]
    assert (
        last.startswith(f"openelm: {path} cannot be written: ")
        and last.count(str(path.parent)) <= 2
    )
    assert ".talk" not in shown.err and list(tmp_path.iterdir()) == []


def test_files_that_cannot_be_saved_lose_neither_the_table_nor_each_other(tmp_path, capsys):
    result = tmp_path / "result.json"
    save(rich_document(), result)
    words = [
        word
        for name in ("output", "csv", "markdown")
        for word in (f"--{name}", str(tmp_path / name))
    ]
    assert main(["benchmark", "--show", str(result), *words]) == 0
    table = capsys.readouterr().out
    sizes = {name: (tmp_path / name).stat().st_size for name in ("output", "csv", "markdown")}
    small = min(sizes, key=sizes.__getitem__)
    for name in sizes:
        (tmp_path / name).unlink()
    with files_of_at_most(sizes[small]):
        assert main(["benchmark", "--show", str(result), *words]) == 2
    shown = capsys.readouterr()
    assert shown.out == table and sorted(path.name for path in tmp_path.iterdir()) == sorted(
        [small, "result.json"]
    )
    lost = [name for name in sizes if name != small]
    assert all(
        f"--{name}: cannot write {tmp_path / name}: File too large" in shown.err for name in lost
    )
    assert shown.err.count("\n") == 1


def test_a_folder_in_place_of_a_configuration_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"is a folder; give a JSON file, perhaps one in it"):
        read_json(tmp_path)
