"""Files of weights that are cut, malformed or hostile are refused by name and fault; so is an array
the writer did not plan.
"""

from __future__ import annotations

import json
import os
import struct
import zipfile
from pathlib import Path

import pytest
from golden_set import GOLDEN, NANO

from openelm_mlx.convert import ConvertOptions
from openelm_mlx.convert.sources.folder import HuggingFaceFolder
from openelm_mlx.convert.sources.gguf import GGUFFile
from openelm_mlx.convert.sources.torch_pt import TorchCheckpoint
from openelm_mlx.convert.targets.folder import write_weights
from openelm_mlx.device import mx
from openelm_mlx.errors import CheckpointError, ConversionError

# safetensors


def header(entries, data: bytes = bytes(64)) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text + data


GOOD = {"dtype": "F32", "shape": [4, 4], "data_offsets": [0, 64]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header({"w": GOOD})[:30], "is truncated or not a safetensors file"),
        (header({"w": GOOD}, bytes(60)), "is truncated: tensor w ends at byte"),
        (
            header(b"{" + b" " * (3 << 20)),
            "has a header of 3145729 bytes; no OpenELM needs above 2097152",
        ),
        (header(b'{"w": '), "cannot be read as safetensors: "),
        (header(b'{"w": "\xff"}'), "cannot be read as safetensors: "),
        (header(b"{" * 20), "cannot be read as safetensors: "),
        (header({"w": {"dtype": "F32"}}), "the header's entry of tensor w is malformed"),
        (header({"w": 3}), "the header's entry of tensor w is malformed"),
        (header({"w": GOOD | {"shape": [-4, -4]}}), "the header's entry of tensor w is malformed"),
        (header({"w": GOOD | {"shape": [1] * 9}}), "the header's entry of tensor w is malformed"),
        (header({"w": GOOD | {"shape": [4, 4.0]}}), "the header's entry of tensor w is malformed"),
        (header({"w": GOOD | {"shape": [4, True]}}), "the header's entry of tensor w is malformed"),
        (
            header({"w": GOOD | {"data_offsets": [0]}}),
            "the header's entry of tensor w is malformed",
        ),
        (
            header({"w": GOOD | {"dtype": "F8_E4M3"}}),
            "tensor w has type F8_E4M3; readable are F64, F32, F16, BF16",
        ),
        (header({"w": GOOD | {"dtype": ["F32"]}}), r"tensor w has type \['F32'\]; readable are"),
        (
            header({"w": GOOD | {"data_offsets": [64, 0]}}),
            r"tensor w of shape \(4, 4\) does not take -64 bytes",
        ),
    ],
)
def test_malformed_safetensors(tmp_path, content, message):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        HuggingFaceFolder(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_safetensors_header_that_is_no_object(tmp_path):
    from openelm_mlx.files import read_header

    (tmp_path / "x").write_bytes(header(b"[]"))
    with pytest.raises(
        CheckpointError, match="cannot be read as safetensors: its header is not an object"
    ):
        read_header(tmp_path / "x")


def test_indexes_that_do_not_fit(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for name in ("a.safetensors", "b.safetensors"):
        (tmp_path / name).write_bytes(header({"w": GOOD}))
    with pytest.raises(
        ConversionError, match="contains 2 safetensors files and no model.safetensors.index.json"
    ):
        HuggingFaceFolder(tmp_path)
    for content, message in (
        ("[", "cannot be read as JSON"),
        ("{}", "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"w": "c.safetensors"}}', "lacks c.safetensors, which its index lists"),
        ('{"weight_map": {"v": "a.safetensors"}}', "the index lists tensors no shard contains: v"),
        (
            '{"weight_map": {"w": "a.safetensors", "x": "b.safetensors"}}',
            "contains tensor w twice, in b.safetensors too",
        ),
    ):
        index.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            HuggingFaceFolder(tmp_path)


def test_weights_of_any_file_name(tmp_path):
    (tmp_path / "anything.bin").write_bytes(header({"w": GOOD}))
    assert HuggingFaceFolder(tmp_path).load("w").shape == (4, 4)


def test_a_file_removed_after_it_was_opened(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(header({"w": GOOD}))
    source = HuggingFaceFolder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ConversionError, match="model.safetensors cannot be read: "):
        source.load("w")


def test_a_gguf_file_cut_after_it_was_opened(tmp_path):
    from openelm_mlx.convert import convert

    convert(
        ConvertOptions(
            source=NANO / "checkpoint.pt", target=tmp_path / "x.gguf", target_format="gguf"
        )
    )
    source = GGUFFile(tmp_path / "x.gguf")
    os.truncate(tmp_path / "x.gguf", 400_000)
    with pytest.raises(ConversionError, match="x.gguf cannot be read: "):
        source.load("transformer.token_embeddings.weight")


# .pt


def zipped(path: Path, pickled: bytes, *extra, **fields) -> Path:
    with zipfile.ZipFile(path, "w", **fields) as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/data/0", bytes(64))
        for name, data in extra:
            archive.writestr(name, data)
    return path


PROTO = b"\x80\x02"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
STORAGE = (
    b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x10tQ"
)


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (
            b"}" * 400_002 + b".",
            "data.pkl has more than 400000 opcodes; no state dict needs as many",
        ),
        (PROTO + b"}", "data.pkl is damaged"),
        (PROTO + b"}2.", "data.pkl uses pickle's opcode DUP, which no state dict needs: refused"),
        (
            PROTO + b"(c__main__\nf\n.",
            "asks for the global __main__.f, which no state dict of tensors needs: refused",
        ),
        (PROTO + b"I3\n.", "uses pickle's opcode INT"),
        (PROTO + b"(.", "damaged .an item is missing"),
        (PROTO + b"h\x07.", "damaged .memo 7 was never stored"),
        (PROTO + b"(q\x00.", "damaged .a mark is stored"),
        (PROTO + b"K\x01K\x02K\x03s.", "damaged .items are set in what is not a dict"),
        (PROTO + b"})K\x01s.", "damaged .a key is neither text nor a number"),
        (PROTO + b"}K\x01a.", "damaged .items are appended to what is not a list"),
        (PROTO + b"K\x01K\x02\x93.", "damaged .a global has no name"),
        (PROTO + b"K\x01)R.", "damaged .what is called is not a function"),
        (PROTO + b".", "data.pkl is damaged .list index"),
        (
            PROTO + b"ctorch\nFloatStorage\n)R.",
            "calls torch.FloatStorage in a way that torch does not",
        ),
        (
            PROTO + TENSOR + b"(K\x01K\x02K\x03K\x04tR.",
            "describes a tensor without a storage, a shape or strides",
        ),
        (
            PROTO + TENSOR + b"(" + STORAGE + b"K\x00(" + b"K\x01" * 9 + b"t)tR.",
            "describes a tensor of 9 dimensions",
        ),
        (
            PROTO + TENSOR + b"(" + STORAGE + b"K\x00(\x88t(K\x01ttR.",
            "whose shape, strides or offset are not whole numbers",
        ),
        (PROTO + b"K\x01Q.", "refers to a storage in a way that torch does not"),
    ],
)
def test_pickles_that_no_state_dict_is(tmp_path, pickled, message):
    with pytest.raises(ConversionError, match=message) as caught:
        TorchCheckpoint(zipped(tmp_path / "x.pt", pickled))
    assert str(tmp_path / "x.pt") in str(caught.value)


def test_later_protocols_are_read(tmp_path):
    """torch.save(..., pickle_protocol=4): frames, memoized strings, globals from the stack."""
    text = b"\x80\x04\x95\x00\x00\x00\x00\x00\x00\x00\x00}\x94\x8c\x01w\x94"
    text += b"\x8c\x0ctorch._utils\x94\x8c\x12_rebuild_tensor_v2\x94\x93\x94("
    text += b"(\x8c\x07storage\x94\x8c\x05torch\x94\x8c\x0cFloatStorage\x94\x93\x94"
    text += b"\x8c\x010\x94\x8c\x03cpu\x94K\x10tQ"
    text += b"K\x00K\x04K\x04\x86\x94K\x04K\x01\x86\x94\x89}t\x94Rs."
    assert TorchCheckpoint(zipped(tmp_path / "x.pt", text)).tensors["w"].shape == (4, 4)


EMPTY = PROTO + b"}."


@pytest.mark.parametrize(
    ("extra", "fields", "message"),
    [
        (
            [],
            {"compression": zipfile.ZIP_DEFLATED},
            "is compressed or encrypted; torch stores plainly",
        ),
        (
            [("a/byteorder", b"big")],
            {},
            "was not saved on a little-endian machine; save it again on one",
        ),
        ([("a/byteorder", b"little" * 9)], {}, "was not saved on a little-endian machine"),
        (
            [("b/x", b"")],
            {},
            "is a zip file, but not a checkpoint of torch.save: it has no single NAME/data.pkl",
        ),
    ],
)
def test_zips_that_torch_does_not_write(tmp_path, extra, fields, message):
    with pytest.raises(ConversionError, match=message):
        TorchCheckpoint(zipped(tmp_path / "x.pt", EMPTY * 20, *extra, **fields))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_records_of_one_name(tmp_path):
    with pytest.raises(ConversionError, match="contains two records named 'a/data/0': refused"):
        TorchCheckpoint(zipped(tmp_path / "x.pt", EMPTY, ("a/data/0", b"")))


def test_a_pickle_beyond_all_size(tmp_path):
    with pytest.raises(
        ConversionError, match="data.pkl has 8388609 bytes; no state dict needs above 8388608"
    ):
        TorchCheckpoint(zipped(tmp_path / "x.pt", bytes((8 << 20) + 1)))


def test_records_that_reach_past_the_file_or_are_damaged(tmp_path):
    data = bytearray(zipped(tmp_path / "x.pt", EMPTY).read_bytes())
    directory = data.index(b"PK\x01\x02")
    longer = bytearray(data)
    struct.pack_into("<2I", longer, directory + 20, 1 << 30, 1 << 30)
    (tmp_path / "x.pt").write_bytes(longer)
    with pytest.raises(ConversionError, match="declares more bytes than the file has; truncated"):
        TorchCheckpoint(tmp_path / "x.pt")
    damaged = bytearray(data)
    damaged[data.index(EMPTY)] ^= 1
    (tmp_path / "x.pt").write_bytes(damaged)
    with pytest.raises(
        ConversionError,
        match="record 'a/data.pkl' does not match its checksum: the file is damaged; download",
    ):
        TorchCheckpoint(tmp_path / "x.pt")
    (tmp_path / "x.pt").write_bytes((GOLDEN / "gpt-test" / "checkpoint.pt").read_bytes())
    source = TorchCheckpoint(tmp_path / "x.pt")
    whole = bytearray((tmp_path / "x.pt").read_bytes())
    for member in zipfile.ZipFile(tmp_path / "x.pt").infolist():
        whole[member.header_offset] = 0
    (tmp_path / "x.pt").write_bytes(whole)
    with pytest.raises(
        ConversionError, match="record '.*/data/.*' is damaged; the file may be truncated"
    ):
        source.load(next(iter(source.tensors)))


# GGUF


def gguf_bytes(*entries: bytes, tensors: tuple[bytes, ...] = ()) -> bytes:
    text = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(entries) + 1)
    return (
        text
        + entry(b"general.architecture", 8, struct.pack("<Q7s", 7, b"openelm"))
        + b"".join((*entries, *tensors))
    )


def entry(name: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I", kind) + value


def place(name: bytes) -> bytes:
    return struct.pack("<Q", len(name)) + name + struct.pack("<I2QIQ", 2, 4, 4, 0, 0)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gguf_bytes(entry(b"x", 99, b"")), "its metadata has a value of unknown type 99, at byte"),
        (
            gguf_bytes(entry(b"x", 9, struct.pack("<IQ", 4, 1 << 40))),
            "has a list of 1099511627776 entries; no OpenELM needs",
        ),
        (
            gguf_bytes(entry(b"x", 9, struct.pack("<IQ", 9, 1))),
            "its metadata has a list of unknown type 9, at byte",
        ),
        (
            gguf_bytes(entry(b"x", 0, b"a"), entry(b"x", 0, b"a")),
            "is damaged: it has the key 'x' twice",
        ),
        (
            gguf_bytes(entry(b"general.alignment", 4, struct.pack("<I", 3))),
            "is damaged: its alignment is 3",
        ),
        (
            gguf_bytes(tensors=(place(b"t"), place(b"t"))) + bytes(999),
            "is damaged: it has a tensor twice",
        ),
        (
            gguf_bytes(tensors=(place(b"token_embd.weight"),)) + bytes(999),
            "this is not an OpenELM checkpoint",
        ),
        (
            gguf_bytes(entry(b"x", 8, struct.pack("<Q", 1 << 60))),
            "is truncated or damaged: its header goes on past byte",
        ),
    ],
)
def test_gguf_headers_that_no_tool_writes(tmp_path, content, message):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ConversionError, match=message) as caught:
        GGUFFile(tmp_path / "x")
    assert str(tmp_path / "x") in str(caught.value)


def test_the_writer_holds_to_its_plan(tmp_path):
    from openelm_mlx.files import TensorInfo

    plan = {"a": TensorInfo("float32", (2, 2))}
    for arrays in ([("a", mx.zeros((3,)))], [("b", mx.zeros((2, 2)))]):
        with pytest.raises(RuntimeError, match="bug: planned a of 16 bytes, got"):
            write_weights(tmp_path, plan, arrays)
