"""Paths of models: what is there and is no model, and what only looks like a path."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import checkpoint
from golden_set import NANO

from openelm_mlx import load
from openelm_mlx.cli.inspect import inspect
from openelm_mlx.engine.hub import resolve_model
from openelm_mlx.errors import CheckpointError, HubError, OpenELMError, OptionError


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("OPENELM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "converted"


@pytest.mark.parametrize(
    "name",
    [
        "./nothing",
        "../nothing/",
        "~/nothing",
        "/nothing",
        "nothing.gguf",
        "some/nothing.pt",
        "a/b/c",
        r"a\b",
        "~nobody/nothing",
    ],
)
def test_what_looks_like_a_path_is_not_asked_of_the_hub(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(HubError) as raised:
        resolve_model(name)
    assert str(raised.value).startswith(
        f"there is no file or folder {name}; a model is a folder, a .gguf file"
    )


def test_what_is_there_and_no_model_says_so(tmp_path):
    (tmp_path / "notes").write_text("hello")
    (tmp_path / "numbers.npz").write_bytes((NANO / "golden.npz").read_bytes())
    for name in ("notes", "numbers.npz"):
        with pytest.raises(
            CheckpointError, match=f"{name} is a file, but not a model; a model is a folder"
        ):
            resolve_model(str(tmp_path / name))
    with pytest.raises(
        CheckpointError,
        match="has no model.safetensors with config.json, and no checkpoint.pt or .gguf",
    ):
        resolve_model(str(tmp_path))
    with pytest.raises(
        OptionError,
        match="--revision main chooses a version on the hub; .*notes does not come from there",
    ):
        resolve_model(str(tmp_path / "notes"), revision="main")
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03")
    with pytest.raises(OpenELMError, match="cut.gguf is truncated or damaged"):
        resolve_model(str(tmp_path / "cut.gguf"))


@pytest.mark.needs("another user than root")
def test_what_may_not_be_read_says_so(tmp_path):
    (tmp_path / "closed").mkdir(mode=0)
    with pytest.raises(HubError, match="closed cannot be read: Permission denied"):
        resolve_model(str(tmp_path / "closed"))


def test_inspect_tells_a_path_from_a_published_size(tmp_path):
    assert (
        inspect("270m")["parameters"]
        == inspect("apple/OpenELM-270M-Instruct")["parameters"]
        > 270e6
    )
    for name in ("./270m", f"{tmp_path}/270m", "~/OpenELM-1_1B"):
        with pytest.raises(HubError, match=f"there is no file or folder {name}"):
            inspect(name)


def test_a_checkpoint_without_its_tokenizer(tmp_path, cache):
    folder = checkpoint(tmp_path / "a")
    (folder / "tokenizer.model").rename(tmp_path / "mine.model")
    with pytest.raises(
        OpenELMError, match="no tokenizer.model beside .*; give one with --tokenizer"
    ):
        load(folder)
    assert load(folder, tokenizer=tmp_path / "mine.model").vocab == 4096
