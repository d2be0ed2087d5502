"""Files made to exhaust a reader or to lead it elsewhere are refused, in little time and memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from formats import TINY, everything, random_folder

from openelm_mlx.errors import OpenELMError

# files made to exhaust the reader, each in little time and memory

BOMBS = {
    "memo.pt": "a pickle that asks for two thousand million memo places",
    "nested.pt": "a pickle of tuples of tuples, 60 deep, as a key",
    "many.pt": "a pickle of millions of lists",
    "expanded.pt": "a tensor of a billion entries over one number",
    "merge.yaml": "merge keys that double 40 times",
    "alias.yaml": "aliases that double 40 times",
    "deep.yaml": "brackets in brackets",
    "long.yaml": "half a megabyte",
    "deep.json": "brackets in brackets",
    "layers.json": "a million million layers",
    "digits.json": "a number of 4000 digits",
    "long.json": "nine megabytes of lists",
    "header.safetensors": "a header of two thousand million bytes",
    "lists.safetensors": "a header of a million lists",
    "shape.safetensors": "a shape of a billion billion numbers",
    "digits.safetensors": "numbers of 4000 digits",
    "count.gguf": "a list of 2**60 entries",
    "tensors.gguf": "2**60 tensors",
    "dims.gguf": "a tensor of 2**62 numbers",
    "piece.json": "a tokenizer with a piece of a million characters",
}


def bomb(name: str, folder: Path) -> None:
    """Write the bomb `name`."""
    import struct
    import zipfile

    def zipped(pickled: bytes) -> bytes:
        with zipfile.ZipFile(folder / name, "w") as archive:
            archive.writestr("a/data.pkl", pickled)
            archive.writestr("a/data/0", bytes(8))
        return (folder / name).read_bytes()

    def header(entries) -> bytes:
        text = json.dumps(entries).encode()
        return len(text).to_bytes(8, "little") + text + bytes(64)

    def metadata(tail: bytes, tensors: int = 1, keys: int = 2) -> bytes:
        text = struct.pack("<4sIQQ", b"GGUF", 3, tensors, keys)
        return text + struct.pack("<Q20sIQ7s", 20, b"general.architecture", 8, 7, b"openelm") + tail

    def tensor(storage_elements: int, count: int) -> bytes:
        text = (
            b"\x80\x02}(X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n("
            + b"(X\x07\x00\x00\x00storage"
        )
        text += (
            b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK"
            + bytes([storage_elements])
            + b"tQK\x00"
        )
        return text + b"J" + struct.pack("<i", count) + b"\x85K\x00\x85\x89}tRu."

    doubling = "\n".join(
        f"k{n}: &k{n} {{<<: [*k{n - 1}, *k{n - 1}], a{n}: 1}}" for n in range(1, 41)
    )
    aliases = "\n".join(f"k{n}: &k{n} [*k{n - 1}, *k{n - 1}]" for n in range(1, 41))
    shape = {"w": {"dtype": "F32", "shape": [1 << 60] * 2, "data_offsets": [0, 64]}}
    deep = "[" * 100_000
    contents = {
        "memo.pt": lambda: zipped(b"\x80\x02}r\xff\xff\xff\x7f."),
        "nested.pt": lambda: zipped(b"\x80\x02}(K\x00\x85" + b"q\x00h\x00\x86" * 60 + b"K\x01u."),
        "many.pt": lambda: zipped(b"\x80\x02" + b"]" * 7_000_000 + b"."),
        "expanded.pt": lambda: zipped(tensor(2, 1 << 30)),
        "merge.yaml": lambda: f"k0: &k0 {{a: 1}}\n{doubling}\n".encode(),
        "alias.yaml": lambda: f"k0: &k0 [a]\n{aliases}\nmodel: *k40\n".encode(),
        "deep.yaml": deep.encode,
        "long.yaml": lambda: b"a: b\n" * 100_000,
        "deep.json": deep.encode,
        "layers.json": lambda: json.dumps(
            TINY.to_hf_dict() | {"num_transformer_layers": 10**12}
        ).encode(),
        "digits.json": lambda: json.dumps(TINY.to_hf_dict() | {"model_dim": 10**4000}).encode(),
        "long.json": lambda: b"[" + b"[]," * 3_000_000 + b"[]]",
        "header.safetensors": lambda: (2_000_000_000).to_bytes(8, "little") + b"{" + bytes(999),
        "lists.safetensors": lambda: header({"w": [[]] * 1_000_000}),
        "shape.safetensors": lambda: header(shape),
        "digits.safetensors": lambda: header(
            {"w": {"dtype": "F32", "shape": [10**4000] * 8, "data_offsets": [0, 10**4000]}}
        ),
        "count.gguf": lambda: metadata(struct.pack("<Q1sIIQ", 1, b"x", 9, 0, 1 << 60)),
        "tensors.gguf": lambda: metadata(b"", tensors=1 << 60),
        "dims.gguf": lambda: metadata(
            struct.pack("<Q1sI2QIQ", 1, b"x", 2, 1 << 62, 1 << 62, 0, 0), keys=1
        ),
        "piece.json": lambda: json.dumps(
            {
                "added_tokens": [],
                "model": {
                    "type": "BPE",
                    "merges": [],
                    "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a" * 1_000_000: 3},
                },
            }
        ).encode(),
    }
    (folder / name).write_bytes(contents[name]())


CHILD = """
import resource, sys
from pathlib import Path
import openelm_mlx.convert.pipeline, openelm_mlx.convert.sources.gguf
import gguf, yaml, sentencepiece, tokenizers
from openelm_mlx.model.config import OpenELMConfig
from openelm_mlx.convert.opening import corenet_section
from openelm_mlx.convert.targets.folder import build_tokenizer_json
from openelm_mlx.convert.opening import open_source
from openelm_mlx.convert.sources.gguf import GGUFFile
from openelm_mlx.files import read_header
from openelm_mlx.convert.sources.torch_pt import TorchCheckpoint
from openelm_mlx.convert.tokenizers import read_tokenizer
from openelm_mlx.errors import OpenELMError
READERS = {".pt": TorchCheckpoint, ".yaml": corenet_section, ".json": OpenELMConfig.from_file,
           ".safetensors": read_header, ".gguf": GGUFFile}
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
import time
for path in map(Path, sys.argv[1:]):
    read = READERS[path.suffix]
    if path.name == "piece.json":
        read = lambda path: build_tokenizer_json(read_tokenizer(path))
    started = time.process_time()
    try:
        read(path)
        print(path.name, "read")
    except OpenELMError as error:
        assert str(path) in str(error), error
        print(path.name, "refused", f"{time.process_time() - started:.1f}")
"""


@pytest.mark.needs("Linux")  # nothing else limits the memory of a process
def test_bombs_are_refused_in_little_time_and_memory(tmp_path):
    """One process for all, with 400 MB above its imports and 60 s of CPU in all."""
    for name in BOMBS:
        bomb(name, tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", CHILD, *(tmp_path / name for name in BOMBS)],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    answers = {line.split()[0]: line.split()[1:] for line in run.stdout.splitlines()}
    assert answers.keys() == BOMBS.keys()
    assert {name for name, answer in answers.items() if answer[0] == "read"} <= {"alias.yaml"}
    assert max(float(answer[1]) for answer in answers.values() if answer[0] == "refused") < 10


# tricks with paths


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "x\0.safetensors", 3, ".."]
)
def test_index_files_cannot_point_elsewhere(tmp_path, name):
    random_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    with pytest.raises(
        OpenELMError,
        match="index.json points to .*; shards must be .safetensors files of this folder",
    ):
        everything(tmp_path)


def test_a_link_inside_a_zip_is_refused(tmp_path):
    import stat
    import zipfile

    info = zipfile.ZipInfo("archive/data/0")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(
        OpenELMError, match="record 'archive/data/0' is a link; torch writes none such: refused"
    ):
        everything(tmp_path / "x.pt")
