"""Damaged and hostile files: whatever is read, the answer is a model or an error of this project that names the file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from formats import GOLDEN, NANO, tokenizer_file
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.convert.adapters import AdaptedCheckpoint, LoraOptions, has_adapters
from openelm_mlx.convert.opening import open_model
from openelm_mlx.convert.tokenizer_model import read_tokenizer

from openelm_mlx.config import OpenELMConfig, corenet_section, expected_tensors
from openelm_mlx.errors import OpenELMError

TINY = OpenELMConfig(model_dim=32, head_dim=8, num_transformer_layers=1, vocab_size=64, num_gqa_groups=1, ffn_dim_divisor=32,
                     qkv_multipliers=(1.0,), ffn_multipliers=(1.0,))  # fmt: skip
FUZZ = settings(max_examples=60, deadline=None, derandomize=True, database=None,
                suppress_health_check=list(HealthCheck))  # fmt: skip
SCRATCH = Path(tempfile.mkdtemp(prefix="openelm-fuzz-"))


def teardown_module():
    import shutil

    shutil.rmtree(SCRATCH, ignore_errors=True)


def tiny_folder() -> Path:
    folder = SCRATCH / "tiny"
    if not folder.exists():
        folder.mkdir()
        rng = np.random.default_rng(0)
        arrays = {n: mx.array(rng.normal(0, 0.1, s).astype(np.float32)) for n, s in expected_tensors(TINY).items()}
        mx.save_safetensors(str(folder / "model.safetensors"), arrays)
        (folder / "config.json").write_text(json.dumps(TINY.to_hf_dict()))
        tokenizer_file(folder, 64).rename(folder / "tokenizer.model")
    return folder


def made(name: str, **fields) -> Path:
    target = SCRATCH / name
    if not target.exists():
        convert(ConvertOptions(source=tiny_folder(), target=target, **fields))
    return target


def damage() -> st.SearchStrategy:
    """What to do to the bytes of a file: (position as a share, bytes to put there or number to cut or repeat)."""
    share = st.floats(0, 1, allow_nan=False)
    flips = st.lists(st.tuples(share, st.binary(min_size=1, max_size=9)), min_size=1, max_size=4)
    return st.one_of(
        st.tuples(st.just("flip"), flips), st.tuples(st.just("cut"), share),
        st.tuples(st.just("insert"), share, st.binary(min_size=1, max_size=40)),
        st.tuples(st.just("all"), st.binary(max_size=200)),
    )  # fmt: skip


def damaged(data: bytes, change, span: int) -> bytes:
    """`data` with the change applied within its first (or, for a negative span, last) `span` bytes."""
    begin, width = (0, min(span, len(data))) if span > 0 else (max(len(data) + span, 0), min(-span, len(data)))

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


def survives(action, *names: str) -> None:
    """`action` succeeds, or fails with a one-line error of this project that names the file."""
    try:
        action()
    except OpenELMError as error:
        text = str(error)
        assert any(name in text for name in names), text
        assert len(text) < 5000


def everything(source: Path, **fields) -> None:
    """Open, check and load all of a source, as a conversion does."""
    opened = open_model(ConvertOptions(source=source, target="x", **fields))
    for name in opened.names.values():
        array = opened.source.load(name)
        mx.eval(array)
        stem = name.removesuffix(".weight")
        if stem in opened.source.forms:
            opened.source.packed(name)


def check_folder(kind: str, original: Path, file: str, change, span: int) -> None:
    folder = SCRATCH / f"damaged-{kind}"
    folder.mkdir(exist_ok=True)
    for path in original.iterdir():
        if path.is_file() and path.name in ("model.safetensors", "config.json", "tokenizer.model", "weights.safetensors"):
            data = path.read_bytes()
            (folder / path.name).write_bytes(damaged(data, change, span) if path.name == file else data)
    survives(lambda: everything(folder), str(folder))


@given(damage(), st.sampled_from([600, -400, 1 << 30]))
@FUZZ
def test_pt(change, span):
    path = SCRATCH / "x.pt"
    path.write_bytes(damaged((GOLDEN / "gpt-test" / "checkpoint.pt").read_bytes(), change, span))
    survives(lambda: everything(path, tokenizer=tokenizer_file(SCRATCH, 64)), str(path), "tokenizer-64")


@given(damage())
@FUZZ
def test_pickle_of_a_pt(change):
    """The zip stays whole and its checksums right, so that the damage reaches the pickle reader."""
    import zipfile

    path = SCRATCH / "y.pt"
    source = GOLDEN / "gpt-test" / "checkpoint.pt"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(info.filename, damaged(data, change, 1 << 30) if info.filename.endswith("data.pkl") else data)
    survives(lambda: everything(path, tokenizer=tokenizer_file(SCRATCH, 64)), str(path), "tokenizer-64")


@given(damage(), st.sampled_from([16, 1200]))
@FUZZ
def test_safetensors(change, span):
    check_folder("hf", tiny_folder(), "model.safetensors", change, span)


@given(damage(), st.sampled_from([16, 3000]))
@FUZZ
def test_quantized_safetensors(change, span):
    check_folder("mlx", made("quantized", bits=4, group_size=32), "model.safetensors", change, span)


@given(damage())
@FUZZ
def test_config_json(change):
    check_folder("config", made("quantized", bits=4, group_size=32), "config.json", change, 1 << 30)


@given(damage(), st.sampled_from([40, 1400, 4000]))
@FUZZ
def test_gguf(change, span):
    path = SCRATCH / "x.gguf"
    path.write_bytes(damaged(made("tiny.gguf", target_format="gguf", bits=8).read_bytes(), change, span))
    survives(lambda: everything(path), str(path))


@given(damage())
@FUZZ
def test_yaml(change):
    path = SCRATCH / "c.yaml"
    path.write_bytes(damaged((GOLDEN / "dora" / "config.yaml").read_bytes(), change, 1 << 30))
    survives(lambda: corenet_section(path), "c.yaml")
    source = GOLDEN / "dora" / "checkpoint.pt"
    survives(lambda: everything(source, config=path, tokenizer=tokenizer_file(SCRATCH, 112)), str(path), str(source),
             "tokenizer-112")  # fmt: skip


@given(damage())
@FUZZ
def test_index_json(change):
    folder = SCRATCH / "sharded"
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "tokenizer.model"):
        (folder / name).write_bytes((tiny_folder() / name).read_bytes())
    shard = "model-00001-of-00001.safetensors"
    (folder / shard).write_bytes((tiny_folder() / "model.safetensors").read_bytes())
    index = json.dumps({"weight_map": dict.fromkeys(expected_tensors(TINY), shard)}).encode()
    (folder / "model.safetensors.index.json").write_bytes(damaged(index, change, 1 << 30))
    survives(lambda: everything(folder), str(folder))


@given(damage(), st.sampled_from(["adapter_config.json", "adapters.safetensors"]))
@settings(FUZZ, max_examples=40)
def test_adapter_folders(change, file):
    folder = SCRATCH / "adapter"
    folder.mkdir(exist_ok=True)
    stem, config = "transformer.layers.0.ffn.proj_2", {"fine_tune_type": "lora", "lora_parameters": {"scale": 2.0}}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    arrays = {f"{stem}.lora_a": mx.ones((32, 2)), f"{stem}.lora_b": mx.ones((2, 32))}
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    (folder / file).write_bytes(damaged((folder / file).read_bytes(), change, 1 << 30))
    survives(lambda: everything(tiny_folder(), adapter_folder=folder), str(folder))


@given(damage(), st.sampled_from([300, -600, 1 << 30]))
@settings(FUZZ, max_examples=30)
def test_tokenizers(change, span):
    path = SCRATCH / "t"
    for original in (tiny_folder() / "tokenizer.model", made("plain") / "tokenizer.json"):
        path.write_bytes(damaged(original.read_bytes(), change, span))
        survives(lambda: read_tokenizer(path), str(path))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=8,
)  # fmt: skip


@given(st.sampled_from(sorted(TINY.to_hf_dict()) + ["quantization"]), json_values)
@FUZZ
def test_any_value_under_any_key_of_a_config(key, value):
    folder = made("quantized", bits=4, group_size=32)
    raw = json.loads((folder / "config.json").read_text())
    target = SCRATCH / "valued"
    target.mkdir(exist_ok=True)
    for name in ("model.safetensors", "tokenizer.model"):
        (target / name).write_bytes((folder / name).read_bytes())
    (target / "config.json").write_text(json.dumps(raw | {key: value}))
    survives(lambda: everything(target), str(target))


@given(st.sampled_from(["dtype", "shape", "data_offsets", None]), json_values)
@FUZZ
def test_any_entry_in_a_safetensors_header(key, value):
    data = (tiny_folder() / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = "transformer.layers.0.attn.out_proj.weight"
    header[name] = value if key is None else header[name] | {key: value}
    target = SCRATCH / "entry"
    target.mkdir(exist_ok=True)
    for side in ("config.json", "tokenizer.model"):
        (target / side).write_bytes((tiny_folder() / side).read_bytes())
    text = json.dumps(header).encode()
    (target / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    survives(lambda: everything(target), str(target))


# files made to exhaust the reader, each in little time and memory

BOMBS = {
    "memo.pt": "a pickle that asks for two thousand million memo places",
    "nested.pt": "a pickle of tuples of tuples, 60 deep, as a key",
    "many.pt": "a pickle of millions of lists",
    "expanded.pt": "a tensor of a billion entries over one number",
    "merge.yaml": "merge keys that double 40 times",
    "alias.yaml": "aliases that double 40 times",
    "deep.yaml": "brackets in brackets", "long.yaml": "half a megabyte",
    "deep.json": "brackets in brackets", "layers.json": "a million million layers", "digits.json": "a number of 4000 digits",
    "long.json": "nine megabytes of lists",
    "header.safetensors": "a header of two thousand million bytes", "lists.safetensors": "a header of a million lists",
    "shape.safetensors": "a shape of a billion billion numbers", "digits.safetensors": "numbers of 4000 digits",
    "count.gguf": "a list of 2**60 entries", "tensors.gguf": "2**60 tensors", "dims.gguf": "a tensor of 2**62 numbers",
    "piece.json": "a tokenizer with a piece of a million characters",
}  # fmt: skip


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
        text = b"\x80\x02}(X\x01\x00\x00\x00wctorch._utils\n_rebuild_tensor_v2\n(" + b"(X\x07\x00\x00\x00storage"
        text += b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK" + bytes([storage_elements]) + b"tQK\x00"
        return text + b"J" + struct.pack("<i", count) + b"\x85K\x00\x85\x89}tRu."

    doubling = "\n".join(f"k{n}: &k{n} {{<<: [*k{n - 1}, *k{n - 1}], a{n}: 1}}" for n in range(1, 41))
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
        "deep.yaml": deep.encode, "long.yaml": lambda: b"a: b\n" * 100_000, "deep.json": deep.encode,
        "layers.json": lambda: json.dumps(TINY.to_hf_dict() | {"num_transformer_layers": 10**12}).encode(),
        "digits.json": lambda: json.dumps(TINY.to_hf_dict() | {"model_dim": 10**4000}).encode(),
        "long.json": lambda: b"[" + b"[]," * 3_000_000 + b"[]]",
        "header.safetensors": lambda: (2_000_000_000).to_bytes(8, "little") + b"{" + bytes(999),
        "lists.safetensors": lambda: header({"w": [[]] * 1_000_000}),
        "shape.safetensors": lambda: header(shape),
        "digits.safetensors": lambda: header({"w": {"dtype": "F32", "shape": [10**4000] * 8, "data_offsets": [0, 10**4000]}}),
        "count.gguf": lambda: metadata(struct.pack("<Q1sIIQ", 1, b"x", 9, 0, 1 << 60)),
        "tensors.gguf": lambda: metadata(b"", tensors=1 << 60),
        "dims.gguf": lambda: metadata(struct.pack("<Q1sI2QIQ", 1, b"x", 2, 1 << 62, 1 << 62, 0, 0), keys=1),
        "piece.json": lambda: json.dumps({"added_tokens": [], "model": {
            "type": "BPE", "merges": [], "vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a" * 1_000_000: 3}}}).encode(),
    }  # fmt: skip
    (folder / name).write_bytes(contents[name]())


CHILD = """
import resource, sys
from pathlib import Path
import openelm_mlx.convert.pipeline, openelm_mlx.convert.sources.gguf, gguf, yaml, sentencepiece, tokenizers
from openelm_mlx.config import OpenELMConfig, corenet_section
from openelm_mlx.convert.folder import build_tokenizer_json
from openelm_mlx.convert.sources import open_source
from openelm_mlx.convert.sources.gguf import GGUFFile
from openelm_mlx.convert.sources.huggingface import read_header
from openelm_mlx.convert.sources.torch_pt import TorchCheckpoint
from openelm_mlx.convert.tokenizer_model import read_tokenizer
from openelm_mlx.errors import OpenELMError
READERS = {".pt": TorchCheckpoint, ".yaml": corenet_section, ".json": OpenELMConfig.from_file,
           ".safetensors": read_header, ".gguf": GGUFFile}
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (400 << 20),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
import time
for path in map(Path, sys.argv[1:]):
    read = (lambda p: build_tokenizer_json(read_tokenizer(p))) if path.name == "piece.json" else READERS[path.suffix]
    started = time.process_time()
    try:
        read(path)
        print(path.name, "read")
    except OpenELMError as error:
        assert str(path) in str(error), error
        print(path.name, "refused", f"{time.process_time() - started:.1f}")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory of a process is limited on Linux only")
def test_bombs_are_refused_in_little_time_and_memory(tmp_path):
    """One process for all, with 400 MB above its imports and 60 s of CPU in all."""
    for name in BOMBS:
        bomb(name, tmp_path)
    run = subprocess.run([sys.executable, "-c", CHILD, *(tmp_path / name for name in BOMBS)], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-3000:]
    answers = {line.split()[0]: line.split()[1:] for line in run.stdout.splitlines()}
    assert answers.keys() == BOMBS.keys()
    assert {name for name, answer in answers.items() if answer[0] == "read"} <= {"alias.yaml"}
    assert max(float(answer[1]) for answer in answers.values() if answer[0] == "refused") < 10


# tricks with paths


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "x\0.safetensors", 3, ".."])
def test_index_files_cannot_point_elsewhere(tmp_path, name):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
    (tmp_path / "model.safetensors").write_bytes((tiny_folder() / "model.safetensors").read_bytes())
    with pytest.raises(OpenELMError, match="index.json points to .*; shards must be .safetensors files of this folder"):
        everything(tmp_path)


def test_a_link_inside_a_zip_is_refused(tmp_path):
    import stat
    import zipfile

    info = zipfile.ZipInfo("archive/data/0")
    info.external_attr = (stat.S_IFLNK | 0o777) << 16
    with zipfile.ZipFile(tmp_path / "x.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr(info, "/etc/passwd")
    with pytest.raises(OpenELMError, match="record 'archive/data/0' is a link; torch writes none such: refused"):
        everything(tmp_path / "x.pt")


def test_pipes_and_folders_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(OpenELMError, match="holds neither safetensors nor"):
        everything(tmp_path)
    with pytest.raises(OpenELMError, match="no checkpoint|neither a file nor"):
        everything(tmp_path / "model.safetensors")


def test_adapters_survive_damage_to_their_list():
    from openelm_mlx.convert.sources.torch_pt import TorchCheckpoint

    source = TorchCheckpoint(GOLDEN / "dora" / "checkpoint.pt")
    names = list(source.tensors)
    for name in names:
        info = source.tensors.pop(name)
        if has_adapters(source):
            survives(lambda: AdaptedCheckpoint(source, LoraOptions(alpha=16.0)), str(source.path))
        source.tensors[name] = info


def test_flipped_weights_are_noticed(tmp_path):
    """A byte changed among the weights of a .pt: the checksum of its record tells."""
    data = bytearray((NANO / "checkpoint.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / "x.pt").write_bytes(data)
    with pytest.raises(OpenELMError, match="x.pt: record '.*/data/.*' does not match its checksum: the file is damaged"):
        everything(tmp_path / "x.pt", tokenizer=NANO / "tokenizer.model")
