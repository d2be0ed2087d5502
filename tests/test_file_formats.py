"""JSON and safetensors headers are read as they are written, or refused by name."""

from __future__ import annotations

import pytest
from full_disk import files_of_at_most

from openelm_mlx.device import mx
from openelm_mlx.dtypes import DTYPES
from openelm_mlx.errors import CheckpointError, ConfigError
from openelm_mlx.files import (
    INDEX,
    WEIGHTS,
    read_header,
    read_index,
    read_json,
    read_own_json,
    read_places,
    weight_files,
    write_json,
)


def test_json_is_written_whole_and_read_back(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"text": "ä", "list": [1]})
    assert path.read_text(encoding="utf-8") == '{\n  "text": "ä",\n  "list": [\n    1\n  ]\n}\n'
    assert read_json(path) == read_own_json(path) == {"text": "ä", "list": [1]}
    with files_of_at_most(10), pytest.raises(OSError):
        write_json(path, {"text": "long" * 9})
    assert read_json(path)["list"] == [1] and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"{", "cannot be read as JSON: "),
        (b"\xff", "cannot be read as JSON: "),
        (b"[" * 100_000, "cannot be read as JSON: "),
        (rb'{"half a character": "\ud800"}', "cannot be read as JSON: .* surrogates"),
        (b"[1]", "must contain an object, not list"),
    ],
)
def test_json_that_cannot_be_read(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"a.json {message}"):
        read_json(path)
    assert read_own_json(path) == {}


def test_headers_say_what_mlx_loads(tmp_path):
    types = sorted(DTYPES.keys() - {"float64"})
    arrays = {name: mx.zeros((n, 3), DTYPES[name].mlx) for n, name in enumerate(types)}
    mx.save_safetensors(str(tmp_path / WEIGHTS), arrays, {"format": "mlx"})
    places = read_header(tmp_path / WEIGHTS)
    assert places == read_places(tmp_path) and weight_files(tmp_path) == [tmp_path / WEIGHTS]
    for name, array in arrays.items():
        info = places[name].info
        assert (info.dtype, info.shape, info.nbytes) == (name, array.shape, array.nbytes)


def test_tensors_of_several_files(tmp_path):
    for name in ("a", "b"):
        mx.save_safetensors(str(tmp_path / f"{name}.safetensors"), {name: mx.zeros(2)})
    with pytest.raises(CheckpointError, match=f"has no {WEIGHTS}; `openelm convert` makes"):
        read_places(tmp_path)
    index = {name: f"{name}.safetensors" for name in ("a", "b")}
    write_json(tmp_path / INDEX, {"weight_map": index})
    assert read_index(tmp_path) == index and read_places(tmp_path).keys() == index.keys()
    for shard in ("../a.safetensors", "..\\a.safetensors", "a\0.safetensors", "a.bin", 3):
        write_json(tmp_path / INDEX, {"weight_map": index | {"a": shard}})
        with pytest.raises(CheckpointError, match="points to .*; shards must be .safetensors file"):
            read_places(tmp_path)
    write_json(tmp_path / INDEX, {"weight_map": index | {"a": "c.safetensors"}})
    with pytest.raises(CheckpointError, match="lacks c.safetensors, which its index lists"):
        weight_files(tmp_path)


def test_a_shard_gives_what_the_index_says_it_has(tmp_path):
    for name in ("a", "b"):
        tensors = {name: mx.zeros(2), f"spare {name}": mx.zeros(3)}
        mx.save_safetensors(str(tmp_path / f"{name}.safetensors"), tensors)
    index = {name: f"{name}.safetensors" for name in ("a", "b")}
    write_json(tmp_path / INDEX, {"weight_map": index})
    assert read_places(tmp_path).keys() == index.keys()
    write_json(tmp_path / INDEX, {"weight_map": index | {"spare a": "b.safetensors"}})
    with pytest.raises(CheckpointError, match="index lists tensors no shard contains: spare a"):
        read_places(tmp_path)


@pytest.mark.parametrize("length", [2, 8, 9, 16])
def test_a_header_longer_than_its_file_is_truncated(tmp_path, length):
    """Up to a file's own size, and what the 8 bytes before the header take away."""
    path = tmp_path / WEIGHTS
    path.write_bytes(length.to_bytes(8, "little") + b" " * 6 + b"{}")
    if length == 8:
        assert read_header(path) == {}
        return
    message = "is truncated or not a safe" if length > 8 else "cannot be read as safetensors"
    with pytest.raises(CheckpointError, match=message):
        read_header(path)
