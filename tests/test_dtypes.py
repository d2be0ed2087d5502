"""The table of number types against the libraries it speaks of."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from openelm_mlx.device import mx
from openelm_mlx.dtypes import BY_GGUF, DTYPES, FLOATS, Dtype, itemsize, name_of

ALL = pytest.mark.parametrize("dtype", DTYPES.values(), ids=list(DTYPES))


@ALL
def test_sizes_and_names_are_those_of_mlx_and_numpy(dtype: Dtype):
    assert dtype.mlx.size == itemsize(dtype.name) == np.dtype(dtype.numpy).itemsize
    assert name_of(dtype.mlx) == dtype.name
    stored = np.dtype(dtype.numpy)
    assert stored.name == ("uint16" if dtype.name == "bfloat16" else dtype.name)
    assert stored.newbyteorder("<") == stored


@ALL
def test_names_are_those_of_torch_and_safetensors(dtype: Dtype):
    torch = pytest.importorskip("torch")
    if dtype.storage:
        assert getattr(torch, dtype.storage)().dtype == dtype.torch
    assert name_of(dtype.torch) == dtype.name and dtype.torch.itemsize == dtype.itemsize
    from safetensors.torch import save

    if not dtype.name.startswith("uint") or dtype.name == "uint8":  # torch has few operations else
        header = save({"a": torch.zeros(1, dtype=dtype.torch)})
        assert f'"dtype":"{dtype.safetensors}"'.encode() in header


def test_names_are_those_of_gguf():
    gguf = pytest.importorskip("gguf")
    for name, dtype in BY_GGUF.items():
        block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
        assert size == block * dtype.itemsize
    assert {dtype.name for dtype in BY_GGUF.values()} == set(FLOATS)
    assert all(mx.issubdtype(DTYPES[name].mlx, mx.floating) for name in FLOATS)


def test_the_table_needs_no_library():
    code = "import openelm_mlx.dtypes, openelm_mlx.quantization, openelm_mlx.files, sys; "
    code += "print([name for name in ('mlx', 'mlx.core', 'numpy', 'torch') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
