"""What MLX compiles of a kernel on a Mac, as far as it can be read without one."""

from __future__ import annotations

import re
import sys

import metal_compile
import pytest
from kernel_cases import BF16, store_case, templates
from metal_source import sources
from metal_syntax import complaints

from openelm_mlx.model.kernels.add_rms_norm import ADD_RMS_NORM

HEADS = (2, 1, 64)


def only(case):
    (source,) = sources([case]).values()
    return source


def test_every_kernel_and_type_is_written_as_mlx_compiles_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["metal_compile.py", str(tmp_path), "--run"])
    assert metal_compile.main() == 0
    printed = capsys.readouterr().out
    texts = {path.stem: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()}
    assert f"{len(texts)} sources in {tmp_path}" in printed
    for name in {case.kernel for case in templates()}:
        for dtype in ("bfloat16_t", "float16_t", "float"):
            assert any(re.match(f"custom_kernel_{name}__.*{dtype}_", stem) for stem in texts)
    name = "custom_kernel_add_rms_norm__bfloat16_t_1280_4_" + "bfloat16_t_" * 3 + "floats_"
    text = texts[name + "bfloat16_t_bfloat16_t"]
    before, body, after = text.partition(ADD_RMS_NORM.source)
    assert body, "the source stands in it as it is"
    assert before.splitlines()[:3] == [
        '#include "mlx/backend/metal/kernels/utils.h"',
        "template <typename T, int D, int EACH>",
        f"[[kernel]] void {name}bfloat16_t_bfloat16_t(",
    ]
    assert "  const device bfloat16_t* weight [[buffer(2)]],\n" in before
    assert "  const constant float& eps [[buffer(3)]],\n" in before
    assert "  device bfloat16_t* normed [[buffer(5)]],\n" in before
    assert "<bfloat16_t, 1280, 4>;" in after


def test_what_a_kernel_writes_to_in_place_is_never_a_constant():
    """Fewer than 8 elements are passed in another address space: positions of few rows are."""
    few, many = (only(store_case(BF16, HEADS, starts=starts)) for starts in [(3,), (3,) * 9])
    assert "const constant int32_t* start" in few and "const device int32_t* start" in many
    assert all("const device bfloat16_t* buffer" in text for text in (few, many))


@pytest.mark.needs("libclang")
def test_clang_reads_every_kernel():
    found = {name: complaints(text) for name, text in sources(templates()).items()}
    assert not any(found.values()), found


@pytest.mark.needs("libclang")
@pytest.mark.parametrize(
    ("right", "wrong", "said"),
    [
        ("(device T*)buffer", "(threadgroup T*)buffer", "cannot initialize a variable of type"),
        ("(device T*)buffer", "buffer", "cannot initialize a variable of type"),
        (
            "float squares = 0;",
            "float squares = 0; threadgroup float* p = &squares;",
            "threadgroup",
        ),
        ("squares +=", "square +=", "undeclared identifier 'square'"),
        ("metal::precise::rsqrt", "metal::exact::rsqrt", "no member named 'exact'"),
        ("simd_sum(squares)", "simd_sum(squares, 1)", "no matching function"),
        ("int row =", "int row", "expected ';'"),
    ],
)
def test_clang_tells_what_metal_would_not_compile(right, wrong, said):
    text = only(store_case(BF16, HEADS))
    assert right in text
    assert any(said in line for line in complaints(text.replace(right, wrong, 1)))
