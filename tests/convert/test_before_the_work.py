"""What can be known before a conversion works is refused before it works."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from formats import TINY, again, random_folder

from openelm_mlx import load
from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.convert.targets import checks
from openelm_mlx.convert.tokenizers import read_tokenizer
from openelm_mlx.errors import ConversionError, OpenELMError, OptionError, TokenizerError

CAFE = os.fsdecode("caf\xe9".encode("latin-1"))
Disk = namedtuple("Disk", "total used free")


@pytest.fixture
def source(tmp_path) -> Path:
    """A model so small that a conversion takes milliseconds."""
    return random_folder(tmp_path / "source")


def assert_refused(source: Path, error: type[OpenELMError], message: str, **fields) -> None:
    """A conversion fails with this text before it measures or writes anything."""
    seen = []
    with pytest.raises(error, match=message):
        options = ConvertOptions(source, source.parent / "new" / "model", **fields)
        convert(options, lambda *progress: seen.append(progress))
    assert seen == [] and not (source.parent / "new").exists()


def test_a_tokenizer_that_other_tools_would_read_differently(source):
    model = read_tokenizer(source / "tokenizer.model").data
    # SentencePiece's own normalization, which tokenizer.json does not have: add_dummy_prefix off
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(model)
    proto.normalizer_spec.add_dummy_prefix = False
    (source / "tokenizer.model").write_bytes(proto.SerializeToString())
    assert_refused(source, TokenizerError, "tokenizer.model", target_bpw=4.5)


@pytest.mark.parametrize("calibrate", ["gptq", "distill", "best"])
def test_calibration_of_block_formats(source, calibrate):
    recipe = source.parent / "blocks.yaml"
    recipe.write_text("default: {mode: mxfp4}\n")
    for flag, fields in (
        ("--mode mxfp4", {"mode": "mxfp4"}),
        ("--recipe", {"recipe": str(recipe)}),
    ):
        message = f"--calibrate {calibrate} learns the rounding of affine matrices, and {flag} has"
        assert_refused(source, OptionError, message, calibrate=calibrate, **fields)


def test_a_text_without_words(source):
    text = source.parent / "text"
    text.write_text(" \n")
    for flag, field in (
        ("--verify-text", "verify_text"),
        ("--calibration-text", "calibration_text"),
    ):
        message = f"{flag} {text} has no text; give another file"
        assert_refused(source, ConversionError, message, target_bpw=4.5, **{field: text})


@pytest.mark.parametrize("fields", [{"verify": True}, {"target_bpw": 16.0}])
def test_a_context_of_one_token(tmp_path, fields):
    source = random_folder(tmp_path / "short", replace(TINY, max_context_length=1))
    message = "short has a context of 1 token, so nothing is measured on text; leave out --verify,"
    assert_refused(source, ConversionError, message, **fields)


@pytest.mark.parametrize("fields", [{}, {"bits": 4, "group_size": 32}, {"target_bpw": 6.0}])
def test_a_disk_without_room(source, monkeypatch, fields):
    target = source.parent / "new" / "model"
    measured = "target_bpw" in fields
    if measured:  # what it may take at most
        nbytes = int(6.0 * TINY.num_parameters / 8)
    else:
        nbytes = convert(ConvertOptions(source, target, dry_run=True, **fields)).written_bytes
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda place: Disk(0, 0, nbytes - 1))
    message = (
        f"model cannot be written: its weights take {nbytes:,} bytes, but {source.parent} has "
        f"{nbytes - 1:,} left; free some space, or choose a place on another disk"
    )
    assert_refused(source, ConversionError, message, **fields)
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda place: Disk(0, 0, nbytes))
    assert measured or convert(ConvertOptions(source, target, **fields)).written_bytes <= nbytes


def test_a_cache_without_room_has_its_own_remedy(source, monkeypatch):
    gguf = again(source, source.parent / "x.gguf")
    monkeypatch.setenv("OPENELM_CACHE", str(source.parent / "cache"))
    monkeypatch.setattr(checks.shutil, "disk_usage", lambda place: Disk(0, 0, 9))
    remedy = r"free some space \(`openelm models` .*\), or set OPENELM_CACHE to another folder"
    with pytest.raises(ConversionError, match=f"its weights take .* has 9 left; {remedy}$"):
        load(gguf)


@pytest.mark.parametrize(
    ("fields", "remedy"),
    [
        ({}, "use a machine with more"),
        ({"verify": True}, "leave out --verify, or use a machine with more"),
        (
            {"target_bpw": 6.0, "calibrate": "gptq"},
            "leave out --calibrate gptq and --target-bpw, or use a machine with more",
        ),
    ],
)
def test_a_machine_without_the_memory(source, monkeypatch, fields, remedy):
    monkeypatch.setattr(checks, "memory_bytes", lambda: 1000)
    message = r"this conversion needs about 0\.\d GB of memory, but this machine has 0\.0; "
    assert_refused(source, ConversionError, message + remedy, **fields)
    report = convert(ConvertOptions(source, source.parent / "new", dry_run=True))
    assert report.memory_bytes > 1000


def test_a_target_that_mlx_could_not_open(source, monkeypatch):
    here = source.parent / CAFE
    try:
        here.mkdir()
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    monkeypatch.chdir(here)
    with pytest.raises(OptionError, match=r"caf\\udce9/model' is not a name in UTF-8"):
        convert(ConvertOptions(source, "model", verify=True))
    assert list(here.iterdir()) == []
    convert(ConvertOptions(source, "model.gguf", verify=True))
    assert [path.name for path in here.iterdir()] == ["model.gguf"]


def test_a_name_that_leaves_no_room_for_the_unfinished_ones(source):
    for ending in ("", ".gguf"):
        options = ConvertOptions(source, source.parent / ("ü" * 120 + ending), dry_run=True)
        with pytest.raises(OptionError, match=r"--output ü{30} ... is a name of more than 2\d\d"):
            convert(options)
    convert(ConvertOptions(source, source.parent / ("n" * 220)))


def test_files_whose_names_are_not_utf_8_do_not_end_the_record(source):
    recipe = source.parent / f"{CAFE}.yaml"
    try:
        recipe.write_text("default: {bits: 4, group_size: 32}")
    except OSError:
        pytest.skip("this file system takes names in UTF-8 only")
    (source / f"LICENSE-{CAFE}").write_text("x")
    (source / "model.safetensors").rename(source / f"{CAFE}.safetensors")
    shutil.copy(source / "tokenizer.model", source.parent)
    convert(ConvertOptions(source, source.parent / "m", recipe=str(recipe)))
    record = json.loads((source.parent / "m" / "conversion.json").read_text())
    assert list(record["source_sha256"]) == ["caf?.safetensors"]
    assert record["command"].endswith("--recipe 'caf?.yaml'")


def test_a_dry_run_reads_no_weights(source, monkeypatch, capsys):
    from openelm_mlx.cli import main
    from openelm_mlx.convert.opening import OpenedModel

    def read(*_):
        raise AssertionError("a dry run reads weights")

    for name in ("load", "pieces", "packed"):
        monkeypatch.setattr(OpenedModel, name, read)
    command = ["convert", str(source), "-o", str(source.parent / "m"), "--dry-run"]
    for more in (["--target-bpw", "6"], ["--bits", "4", "--group-size", "32", "--verify"]):
        assert main([*command, *more, "--calibrate", "distill"]) == 0
        shown = capsys.readouterr().out
        assert ("the plan has to be measured" in shown) == ("--target-bpw" in more)
    report = convert(ConvertOptions(source, source.parent / "m", dry_run=True, target_bpw=6.0))
    assert report.plan == {} and 5.9 < report.bits_per_weight <= 6.0


def test_a_size_that_no_plan_has(source):
    assert_refused(
        source,
        OptionError,
        r"target_bpw is 2.1; the smallest this model can be is 4.\d{3}",
        target_bpw=2.1,
    )
