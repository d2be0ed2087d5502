"""A .pt file is read as torch reads it, without torch; one that torch did not write is refused."""

from __future__ import annotations

import collections
import io
import pickle
import zipfile

import numpy as np
import pytest
from golden_set import GOLDEN

from openelm_mlx.convert.sources.torch_pt import TorchCheckpoint
from openelm_mlx.device import mx
from openelm_mlx.errors import ConversionError


class Global:
    """Pickled as a bare global of torch, which need not be installed."""

    def __init__(self, name: str) -> None:
        self.module, self.name = name.rsplit(".", 1)


class Call:
    def __init__(self, name, *args) -> None:
        self.name, self.args = name, args


class Storage:
    def __init__(self, key, kind, elements) -> None:
        self.pid = ("storage", Global(f"torch.{kind}"), key, "cpu", elements)


class Writer(pickle._Pickler):
    """Writes the globals and storages above in torch's form."""

    def persistent_id(self, obj):
        return obj.pid if isinstance(obj, Storage) else None

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, Global):
            self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call):
            self.save(Global(obj.name))
            self.save(obj.args)
            self.write(b"R")
        else:
            super().save(obj, save_persistent_id)


def tensor(key, kind, elements, shape, strides, offset=0, metadata=()):
    storage, hooks = Storage(key, kind, elements), collections.OrderedDict()
    window = (storage, offset, shape, strides, False, hooks, *metadata)
    return Call("torch._utils._rebuild_tensor_v2", *window)


def write(path, state, storages, extra=(), root="archive"):
    stream = io.BytesIO()
    Writer(stream, 2).dump(state)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{root}/data.pkl", stream.getvalue())
        archive.writestr(f"{root}/byteorder", "little")
        for key, array in storages.items():
            archive.writestr(f"{root}/data/{key}", array.tobytes())
        for name, data in extra:
            archive.writestr(name, data)
    return path


def test_shared_storage_strides_and_offset(tmp_path):
    data = np.arange(24, dtype=np.float32)
    state = {
        "plain": tensor("0", "FloatStorage", 24, (4, 6), (6, 1)),
        "transposed": tensor("0", "FloatStorage", 24, (6, 4), (1, 6)),
        "window": tensor("0", "FloatStorage", 24, (2, 3), (12, 2), offset=1),
        "scalar": tensor("0", "FloatStorage", 24, (), (), offset=5),
        "expanded": tensor("0", "FloatStorage", 24, (3, 2), (0, 1), offset=2),
        "parameter": Call(
            "torch._utils._rebuild_parameter",
            tensor("0", "FloatStorage", 24, (24,), (1,)),
            True,
            {},
        ),
    }
    file = TorchCheckpoint(write(tmp_path / "x.pt", state, {"0": data}))
    view = np.lib.stride_tricks.as_strided
    expected = {
        "plain": data.reshape(4, 6),
        "transposed": data.reshape(4, 6).T,
        "scalar": data[5],
        "window": view(data[1:], (2, 3), (48, 8)),
        "expanded": np.tile(data[2:4], (3, 1)),
        "parameter": data,
    }
    assert file.tensors.keys() == expected.keys()
    for name, want in expected.items():
        assert file.tensors[name].shape == want.shape
        np.testing.assert_array_equal(np.array(file.load(name)), want)


def test_a_negative_view_stands_for_the_opposite_of_its_storage(tmp_path):
    """torch.save(torch._neg_view(x)) writes x, and that it is to be negated."""
    data = np.arange(6, dtype=np.float32)
    window = ("0", "FloatStorage", 6, (2, 3), (3, 1))
    state = {
        "negative": tensor(*window, metadata=[{"neg": True}]),
        "neither": tensor(*window, metadata=[{"neg": False, "conj": False}]),
        "none": tensor(*window, metadata=[None]),
    }
    file = TorchCheckpoint(write(tmp_path / "x.pt", state, {"0": data}))
    for name, sign in (("negative", -1), ("neither", 1), ("none", 1)):
        np.testing.assert_array_equal(np.array(file.load(name)), sign * data.reshape(2, 3))
        assert np.array(file.reader(name)(1, 2)).tolist() == [(sign * data[3:]).tolist()]
    for bits in ({"conj": True}, {"neg": 1}, {"other": True}, 3):
        state = {"w": tensor(*window, metadata=[bits])}
        with pytest.raises(ConversionError, match="with the metadata .*only torch's negative bit"):
            TorchCheckpoint(write(tmp_path / "x.pt", state, {"0": data}))


def test_a_file_without_checksums(tmp_path):
    """torch.serialization.set_crc32_options(False) writes 0 in their place."""
    data = np.arange(4, dtype=np.float32)
    path = write(tmp_path / "x.pt", {"w": tensor("0", "FloatStorage", 4, (4,), (1,))}, {"0": data})
    content = path.read_bytes()
    for mark, place in ((b"PK\x03\x04", 14), (b"PK\x01\x02", 16)):
        first, *rest = content.split(mark)
        rest = [part[: place - 4] + bytes(4) + part[place:] for part in rest]
        content = mark.join([first, *rest])
    path.write_bytes(content)
    assert {info.CRC for info in zipfile.ZipFile(path).infolist()} == {0}
    assert TorchCheckpoint(path).load("w").tolist() == data.tolist()


def test_rotary_frequencies_are_kept_apart(tmp_path):
    state = {"layers.0.attn.pos_embedding.inv_freq": tensor("0", "FloatStorage", 4, (4,), (1,))}
    state["w"] = tensor("0", "FloatStorage", 4, (4,), (1,))
    data = np.arange(4, dtype=np.float32)
    file = TorchCheckpoint(write(tmp_path / "x.pt", state, {"0": data}))
    info, read = file.rotary
    assert list(file.tensors) == ["w"] and info.shape == (4,)
    assert read().tolist() == data.tolist()
    state["inv_freq"] = tensor("0", "FloatStorage", 4, (9,), (1,))
    with pytest.raises(ConversionError, match="inv_freq reaches element 8 of a storage of 4"):
        TorchCheckpoint(write(tmp_path / "x.pt", {"inv_freq": state["inv_freq"]}, {"0": data}))


def test_types(tmp_path):
    values = np.array([1.5, -2.0, 0.25, 3.0], np.float32)
    storages = {
        "0": values,
        "1": values.astype(np.float16),
        "2": (values.view(np.uint32) >> 16).astype(np.uint16),
        "3": values.astype(np.float64),
        "4": values.astype(np.int64),
    }
    kinds = ("FloatStorage", "HalfStorage", "BFloat16Storage", "DoubleStorage", "LongStorage")
    state = {
        "model": {kind: tensor(str(i), kind, 4, (2, 2), (2, 1)) for i, kind in enumerate(kinds)}
    }
    file = TorchCheckpoint(write(tmp_path / "x.pt", state, storages))
    for kind, dtype in zip(
        kinds, (mx.float32, mx.float16, mx.bfloat16, mx.float32, mx.int64), strict=True
    ):
        array = file.load(kind)
        assert array.dtype == dtype
        want = values.astype(np.int64) if dtype == mx.int64 else values
        assert array.astype(mx.float32).flatten().tolist() == want.tolist()


def test_the_model_of_a_full_training_checkpoint(tmp_path):
    """The keys are those of corenet/utils/checkpoint_utils.py, the optimizer's those of AdamW."""
    weights = [np.full(6, value, np.float32) for value in (1, 2, 3)]
    model, first, second = (tensor(str(key), "FloatStorage", 6, (2, 3), (3, 1)) for key in range(3))
    group = {"lr": 5e-4, "betas": (0.9, 0.95), "amsgrad": False, "foreach": None, "params": [0]}
    state = {
        "iterations": 349999,
        "epoch": 0,
        "model_state_dict": collections.OrderedDict(w=model),
        "optim_state_dict": {
            "state": {0: {"step": 7.0, "exp_avg": first, "exp_avg_sq": second}},
            "param_groups": [group],
        },
        "best_metric": float("inf"),
        "is_interval_ckpt": True,
        "gradient_scaler_state_dict": {"scale": 65536.0, "growth_interval": 2000},
        "ema_state_dict": collections.OrderedDict(w=second),
    }
    file = TorchCheckpoint(write(tmp_path / "x.pt", state, dict(zip("012", weights, strict=True))))
    assert list(file.tensors) == ["w"] and file.load("w").tolist() == [[1.0] * 3] * 2


@pytest.mark.parametrize(
    "name", ["os.system", "builtins.eval", "torch.load", "collections.Counter"]
)
def test_other_globals_are_refused_by_name(tmp_path, name):
    path = write(tmp_path / "x.pt", {"w": Call(name, "touch pwned")}, {})
    with pytest.raises(ConversionError, match=f"asks for the global {name}.*refused"):
        TorchCheckpoint(path)


GOOD = {"w": tensor("0", "FloatStorage", 4, (4,), (1,))}
FOUR = {"0": np.zeros(4, np.float32)}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({"w": tensor("0", "FloatStorage", 4, (5,), (1,))}, "reaches element 4 of a storage of 4"),
        ({"w": tensor("0", "FloatStorage", 4, (2,), (1,), offset=3)}, "reaches element 4"),
        ({"w": tensor("0", "FloatStorage", 4, (2,), (-1,), offset=3)}, "impossible shape"),
        ({"w": tensor("0", "FloatStorage", 9, (4,), (1,))}, "declares a storage of 36 bytes"),
        ({"w": tensor("7", "FloatStorage", 4, (4,), (1,))}, "needs storage 7"),
        ({"w": tensor("../0", "FloatStorage", 4, (4,), (1,))}, "in a way that torch does not"),
        ({"w": tensor("0", "FloatStorage", 4, (1 << 40,), (0,))}, "is larger than its storage"),
        ({"w": 3}, "entries that are not tensors: w"),
        ([1], "contains no tensors by name"),
    ],
)
def test_impossible_tensors_are_refused(tmp_path, state, message):
    with pytest.raises(ConversionError, match=message):
        TorchCheckpoint(write(tmp_path / "x.pt", state, FOUR))


@pytest.mark.parametrize("name", ["archive/../evil", "/etc/passwd", "archive\\x/y", "evil"])
def test_path_tricks_are_refused(tmp_path, name):
    with pytest.raises(ConversionError, match="torch writes none such"):
        TorchCheckpoint(write(tmp_path / "x.pt", GOOD, FOUR, extra=[(name, b"x")]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\x80\x02abc", "legacy format"),
        (b"hello", "not a checkpoint of torch.save"),
        (b"PK\x03\x04abc", "truncated"),
    ],
)
def test_other_files_are_explained(tmp_path, content, message):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ConversionError, match=message):
        TorchCheckpoint(tmp_path / "x.pt")


def test_a_truncated_file(tmp_path):
    whole = (GOLDEN / "tied-gqa4" / "checkpoint.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConversionError, match="is truncated"):
        TorchCheckpoint(tmp_path / "x.pt")


def test_damaged_pickle(tmp_path):
    path = tmp_path / "x.pt"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}q")
    with pytest.raises(ConversionError, match="data.pkl is damaged"):
        TorchCheckpoint(path)
