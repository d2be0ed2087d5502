"""A source is known by its content, whatever its name; what cannot be opened is refused in plain
words.
"""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections import Counter

import pytest
from formats import again, everything, tokenizer_file, weights
from golden_set import GOLDEN, NANO

from openelm_mlx.convert import ConvertOptions
from openelm_mlx.convert.opening import open_model, open_source
from openelm_mlx.convert.sources import LEGACY, kind_of
from openelm_mlx.convert.sources.gguf import GGUFFile
from openelm_mlx.convert.sources.torch_pt import TorchCheckpoint
from openelm_mlx.errors import ConversionError, OpenELMError
from openelm_mlx.model.config import OpenELMConfig, expected_tensors


def test_a_format_is_found_by_content_not_by_name(tmp_path, nano):
    shutil.copy(NANO / "checkpoint.pt", tmp_path / "weights.gguf")
    assert isinstance(open_source(tmp_path / "weights.gguf"), TorchCheckpoint)
    again(nano, tmp_path / "g", target_format="gguf")
    (tmp_path / "g").rename(tmp_path / "model.pt")
    assert isinstance(open_source(tmp_path / "model.pt"), GGUFFile)
    (tmp_path / "folder").mkdir()
    (tmp_path / "model.pt").rename(tmp_path / "folder" / "model.safetensors")
    assert isinstance(open_source(tmp_path / "folder"), GGUFFile)


def test_every_source_has_the_same_names(tmp_path, nano):
    gguf = again(nano, tmp_path / "g", target_format="gguf")
    quantized = again(nano, tmp_path / "q", bits=4)
    for source in (NANO / "checkpoint.pt", nano, quantized, gguf):
        shapes = {name: info.shape for name, info in open_source(source).tensors.items()}
        assert shapes == expected_tensors(OpenELMConfig.from_file(nano / "config.json"))


def test_from_forces_a_format(tmp_path, nano):
    source = tmp_path / "both"
    shutil.copytree(nano, source)
    shutil.copy(NANO / "checkpoint.pt", source / "checkpoint.pt")
    assert open_source(source).tensors.keys() == weights(nano).keys()
    assert isinstance(open_source(source, "pt"), TorchCheckpoint)
    with pytest.raises(ConversionError, match="contains nothing that --from gguf reads"):
        open_source(source, "gguf")
    with pytest.raises(ConversionError, match="is not a GGUF file"):
        open_source(NANO / "checkpoint.pt", "gguf")
    with pytest.raises(
        ConversionError, match="is not a folder; --from mlx takes the folder of a model"
    ):
        open_source(NANO / "checkpoint.pt", "mlx")
    with pytest.raises(ConversionError, match="not a checkpoint of torch.save"):
        open_source(nano / "config.json", "pt")


def test_sources_that_are_none(tmp_path, nano):
    with pytest.raises(
        ConversionError,
        match="does not exist; give a CoreNet .pt file, a folder of safetensors or a GGUF",
    ):
        open_source(tmp_path / "nothing")
    with pytest.raises(ConversionError, match="contains neither safetensors nor a .pt or"):
        open_source(tmp_path)
    with pytest.raises(ConversionError, match="is one file of a model; give its folder"):
        open_source(nano / "model.safetensors")
    for name in ("a", "b"):
        shutil.copy(NANO / "checkpoint.pt", tmp_path / name)
    with pytest.raises(ConversionError, match="contains 2 pt files; name one of them"):
        open_source(tmp_path)
    (tmp_path / "b").write_bytes(b"GGUF")
    with pytest.raises(ConversionError, match="contains b and a, two models; name one of them"):
        open_source(tmp_path)
    (tmp_path / "pytorch_model.bin.index.json").write_text("{}")
    with pytest.raises(ConversionError, match="parts of torch's format; save them as safetensors"):
        open_source(tmp_path)


def test_other_zips_and_pickles_in_a_folder_are_not_checkpoints(tmp_path):
    shutil.copytree(NANO, tmp_path / "m")
    assert (tmp_path / "m" / "golden.npz").is_file()
    with zipfile.ZipFile(tmp_path / "m" / "notes.docx", "w") as archive:
        archive.writestr("word/document.xml", "<w:document/>")
    (tmp_path / "m" / "state.pkl").write_bytes(pickle.dumps({"step": 3}))
    assert isinstance(open_source(tmp_path / "m"), TorchCheckpoint)
    with pytest.raises(ConversionError, match="notes.docx is a zip file, but not a checkpoint of"):
        open_source(tmp_path / "m" / "notes.docx")
    whole = (NANO / "checkpoint.pt").read_bytes()
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "x").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConversionError, match="x is truncated: its directory at the end is missi"):
        open_source(tmp_path / "cut")
    (tmp_path / "cut" / "x").write_bytes(b"\x80\x02" + LEGACY + b"old")
    with pytest.raises(ConversionError, match="x is in torch's legacy format"):
        open_source(tmp_path / "cut")


def test_a_folder_without_config_is_read_off_its_shapes(tmp_path, nano):
    shutil.copytree(nano, tmp_path / "bare")
    (tmp_path / "bare" / "config.json").unlink()
    opened = open_model(ConvertOptions(source=tmp_path / "bare", target=tmp_path / "m"))
    assert (
        opened.trimmed.num_parameters
        == OpenELMConfig.from_file(nano / "config.json").num_parameters
    )


def test_files_that_may_not_be_read(tmp_path, monkeypatch):
    def refuse(*arguments, **fields):
        raise PermissionError(13, "Permission denied")

    (tmp_path / "x.pt").write_bytes(b"PK\x03\x04")
    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr("zipfile.ZipFile", refuse)
    for read in (kind_of, TorchCheckpoint, GGUFFile):
        with pytest.raises(ConversionError, match=r"x.pt cannot be read: .*Permission denied"):
            read(tmp_path / "x.pt")


def test_a_file_that_is_empty_or_not_what_its_name_says(tmp_path):
    for name, data, text in (
        ("x.gguf", b"", "x.gguf is empty; fetch or copy it again"),
        ("x.pt", b"", "x.pt is empty"),
        ("X.GGUF", b"version https://git-lfs", "X.GGUF is not a GGUF file"),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ConversionError, match=text):
            open_source(tmp_path / name)


def test_pipes_and_folders_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(OpenELMError, match="contains neither safetensors nor"):
        everything(tmp_path)
    with pytest.raises(
        ConversionError, match="is neither a file nor a folder; give a CoreNet .pt file"
    ):
        everything(tmp_path / "model.safetensors")


@pytest.mark.parametrize("kind", ["checkpoint", "folder", "quantized", "gguf", "adapted"])
def test_a_matrix_that_is_quantized_in_pieces_is_decoded_once(tmp_path, nano, kind, monkeypatch):
    """Each source gives the same rows; those that cannot read rows alone load a tensor once."""
    fields = {"bits": 3, "tokenizer": NANO / "tokenizer.model", "measure": False}
    source = nano if kind == "folder" else NANO / "checkpoint.pt"
    if kind == "quantized":
        source = again(nano, tmp_path / "q", bits=8)
    elif kind == "gguf":
        source = again(nano, tmp_path / "x.gguf", target_format="gguf")
    elif kind == "adapted":
        source = GOLDEN / "lora" / "checkpoint.pt"
        fields |= {"group_size": 32, "tokenizer": tokenizer_file(tmp_path, 112)}
    want = again(source, tmp_path / "at-once", **fields)
    reader = type(open_model(ConvertOptions(source, tmp_path / "m", **fields)).source)
    load, loads = reader.load, Counter()
    monkeypatch.setattr(reader, "load", lambda self, n: loads.update([n]) or load(self, n))
    monkeypatch.setattr("openelm_mlx.convert.pipeline.CHUNK_BYTES", 4096)
    pieces = again(source, tmp_path / "in-pieces", **fields)
    assert (pieces / "model.safetensors").read_bytes() == (want / "model.safetensors").read_bytes()
    assert loads and set(loads.values()) == {1}
