"""`--force` replaces what a conversion wrote and nobody has changed since, and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from formats import again, random_folder

from openelm_mlx.convert import ConvertOptions, convert, targets
from openelm_mlx.convert.targets import checks
from openelm_mlx.errors import ConversionError, OptionError


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A model so small that a conversion takes milliseconds."""
    return random_folder(tmp_path_factory.mktemp("source"))


@pytest.fixture
def model(tmp_path, source) -> Path:
    """A folder that a conversion wrote."""
    return again(source, tmp_path / "model")


def contents(folder: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def with_adapter(model: Path) -> Path:
    """Put an adapter's folder into the model's and into its record."""
    (model / "adapter").mkdir()
    (model / "adapter" / "adapter_config.json").write_text("some words")
    checks.write_record(model, json.loads((model / "conversion.json").read_text()))
    return model / "adapter"


def assert_spared(tmp_path: Path, source: Path, target: Path, message: str, **fields) -> None:
    """A conversion with --force to this target fails with this text and changes nothing."""
    before = contents(tmp_path)
    with pytest.raises(ConversionError, match=message):
        convert(ConvertOptions(source, target, force=True, **fields))
    assert contents(tmp_path) == before


def test_a_folder_that_a_conversion_wrote_is_replaced(tmp_path, source, model):
    (model / ".DS_Store").write_bytes(b"x")  # the Finder's
    (model / "model.safetensors").touch()
    convert(ConvertOptions(source, model, force=True, dtype="float16"))
    record = json.loads((model / "conversion.json").read_text())
    assert record["dtype"] == "float16" and not (model / ".DS_Store").exists()
    written = {path.name for path in model.iterdir()}
    assert record["files"].keys() == written
    convert(ConvertOptions(source, model, force=True))


def test_an_empty_folder_is_replaced(tmp_path, source):
    (tmp_path / "empty").mkdir()
    convert(ConvertOptions(source, tmp_path / "empty", force=True))
    assert (tmp_path / "empty" / "config.json").is_file()


def test_a_folder_of_an_earlier_version_is_replaced_if_all_names_are_ours(tmp_path, source, model):
    record = json.loads((model / "conversion.json").read_text())
    del record["files"]
    (model / "conversion.json").write_text(json.dumps(record))
    (model / "LICENSE").write_text("x")
    for name in ("notes.txt", "adapters.safetensors"):
        shutil.copytree(model, tmp_path / "other")
        (tmp_path / "other" / name).write_text("x")
        assert_spared(
            tmp_path, source, tmp_path / "other", f"contains {name}, which openelm convert did"
        )
        shutil.rmtree(tmp_path / "other")
    convert(ConvertOptions(source, model, force=True))
    assert not (model / "LICENSE").exists()


def test_a_project_with_a_config_json_is_spared(tmp_path, source):
    (tmp_path / "project" / "src").mkdir(parents=True)
    for name in ("config.json", "thesis.txt", "src/main.js", "zebra"):
        (tmp_path / "project" / name).write_text("{}")
    message = (
        r"project is not a folder that openelm convert wrote \(it contains config.json, src, "
        r"src/main.js and 2 more\), so --force does not replace it; choose another folder"
    )
    assert_spared(tmp_path, source, tmp_path / "project", message)


def test_the_model_folder_of_another_program_is_spared(tmp_path, source):
    shutil.copytree(source, tmp_path / "hub")
    assert_spared(tmp_path, source, tmp_path / "hub", "is not a folder that openelm convert wrote")


@pytest.mark.parametrize("name", ["thesis.txt", "adapters/mine.safetensors", "notes/", ".git/HEAD"])
def test_a_folder_with_something_added_is_spared(tmp_path, source, model, name):
    place = model / name
    (place if name.endswith("/") else place.parent).mkdir(exist_ok=True)
    if not name.endswith("/"):
        place.write_text("precious")
    first = name.partition("/")[0]
    assert_spared(
        tmp_path, source, model, f"model contains {first}.*, which openelm convert did not"
    )


@pytest.mark.parametrize("name", ["README.md", "model.safetensors", "generation_config.json"])
def test_a_folder_with_a_changed_file_is_spared(tmp_path, source, model, name):
    data = (model / name).read_bytes()
    (model / name).write_bytes(data[:-2] + b"!" + data[-1:])  # of the same length
    assert_spared(
        tmp_path, source, model, f"model has a changed {name}, so --force does not replace it"
    )


def test_a_folder_whose_record_has_a_note_is_spared(tmp_path, source, model):
    path = model / "conversion.json"
    record = json.loads(path.read_text())
    message = "model has a changed .*conversion.json, so --force does not replace it"
    for changed in ({"note": "mine"}, {"files": {**record["files"], "README.md": "0"}}):
        path.write_text(json.dumps(record | changed))
        assert_spared(tmp_path, source, model, message)
    path.write_text(json.dumps(record))
    convert(ConvertOptions(source, model, force=True))
    assert json.loads(path.read_text())["files"].keys() == record["files"].keys()


def test_links_and_files_are_spared(tmp_path, source, model):
    (tmp_path / "link").symlink_to(model)
    assert_spared(tmp_path, source, tmp_path / "link", "link is not a model folder")
    (tmp_path / "file").write_text("x")
    assert_spared(tmp_path, source, tmp_path / "file", "file is not a model folder")


def test_only_a_gguf_is_replaced_by_a_gguf(tmp_path, source):
    thesis = tmp_path / "thesis.txt"
    thesis.write_text("my thesis")
    message = "thesis.txt is not a GGUF file, so --force does not replace it; choose another file"
    assert_spared(tmp_path, source, thesis, message, target_format="gguf")
    (tmp_path / "link.gguf").symlink_to(thesis)
    assert_spared(tmp_path, source, tmp_path / "link.gguf", "link.gguf is not a GGUF file")
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "big.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    assert_spared(
        tmp_path, source, tmp_path / "big.gguf", "big.gguf is a GGUF file of another model than"
    )
    thesis.write_bytes(b"")  # as mktemp makes it
    convert(ConvertOptions(source, thesis, target_format="gguf", force=True))
    convert(ConvertOptions(source, thesis, target_format="gguf", force=True))
    assert thesis.read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_what_is_added_during_the_work_is_spared(
    tmp_path, source, model, monkeypatch, exchange, late
):
    """Added before the old target is checked again, or between that check and the replacement."""
    if not exchange:
        monkeypatch.setattr(targets, "exchange", lambda new, target: False)
    seen, check = [], targets.check_replaceable

    def add(*arguments, **fields):
        if late:
            seen.append(check(*arguments, **fields))
        if len(seen) == (2 if late else 1):
            (model / "thesis.txt").write_text("precious")
        if not late:
            seen.append(check(*arguments, **fields))

    monkeypatch.setattr(targets, "check_replaceable", add)
    before = contents(model)
    with pytest.raises(ConversionError, match="model contains thesis.txt, which openelm"):
        convert(ConvertOptions(source, model, force=True, dtype="float16"))
    assert contents(model) == {**before, "thesis.txt": b"precious"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_left_by_a_killed_run_stays_if_somebody_put_a_file_there(tmp_path, source):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left = tmp_path / f".model.old-{process.pid}-abc"
    left.mkdir()
    (left / "thesis.txt").write_text("precious")
    again(source, tmp_path / "model")
    assert (left / "thesis.txt").is_file()


def test_an_adapter_left_by_a_killed_run_is_put_back_or_removed(tmp_path, source):
    """An adapter has no config.json that would tell that it is whole."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    left = {name: tmp_path / f".model.{name}-{process.pid}-abc" for name in ("old", "partial")}
    for folder in left.values():
        folder.mkdir()
        (folder / "adapters.safetensors").write_text("x")
        (folder / "adapter_config.json").write_text("{}")
    (left["old"] / "conversion.json").write_text("{}")
    targets.clear_leftovers(tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "adapters.safetensors").is_file()


def test_source_and_target_are_compared_as_files(tmp_path, source, model):
    (tmp_path / "link").symlink_to(model)
    message = r"model contains what is to be read \(.*link\), so it is not replaced"
    assert_spared(tmp_path, tmp_path / "link", model, message)
    own = random_folder(tmp_path / "own")
    (own / "model.safetensors").unlink()
    (own / "model.safetensors").symlink_to(model / "model.safetensors")
    message = r"model contains what is to be read \(.*own/model.safetensors\)"
    assert_spared(tmp_path, own, model, message)


def test_inputs_inside_the_target_are_spared(tmp_path, source, model):
    inputs = {
        "tokenizer": model / "tokenizer.model",
        "config": model / "config.json",
        "verify_text": model / "README.md",
        "calibration_text": model / "README.md",
    }
    for name, path in inputs.items():
        asked = {"target_bpw": 4.5} if name == "calibration_text" else {}
        message = rf"contains what is to be read \({path}\)"
        assert_spared(tmp_path, source, model, message, **{name: path}, **asked)
    text = with_adapter(model) / "adapter_config.json"
    assert_spared(tmp_path, source, model, "contains what is to be read", verify_text=text)
    os.link(model / "tokenizer.model", tmp_path / "tokenizer.model")  # this name stays
    convert(ConvertOptions(source, model, force=True, tokenizer=tmp_path / "tokenizer.model"))


def test_the_file_in_a_source_folder_is_spared(tmp_path, source):
    (tmp_path / "folder").mkdir()
    only = again(source, tmp_path / "folder" / "x.gguf")
    assert_spared(tmp_path, only.parent, only, r"x.gguf contains what is to be read \(.*x.gguf\)")


@pytest.mark.parametrize("part", ["", "adapter"])
def test_a_source_under_the_name_of_a_bind_mount_is_spared(tmp_path, source, model, part):
    with_adapter(model)
    (tmp_path / "bound").mkdir()
    mount = ["mount", "--bind", model / part, tmp_path / "bound"]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("wants the right to mount")
    try:
        message = r"model contains what is to be read \(.*bound\)"
        assert_spared(tmp_path, tmp_path / "bound", model, message)
    finally:
        subprocess.run(["umount", tmp_path / "bound"], check=True)


def test_a_target_that_ends_in_gguf_is_a_gguf(tmp_path, source):
    for name in ("x.gguf", "y.GGUF"):
        convert(ConvertOptions(source, tmp_path / name))
        assert (tmp_path / name).read_bytes()[:4] == b"GGUF"
    for kind in ("mlx", "hf"):
        message = f"--to {kind} writes a folder, but --output .*z.gguf is the name of a GGUF file"
        with pytest.raises(OptionError, match=message):
            ConvertOptions(source, tmp_path / "z.gguf", target_format=kind)


def test_an_unchanged_file_is_read_once(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"one")
    first, state = checks.sha256(path), path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert checks.sha256(path) != first
    assert checks.sha256(tmp_path) is None
