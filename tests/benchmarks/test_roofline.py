"""Bytes that a token reads, by hand and by the headers of a real folder; bandwidth of a copy."""

from __future__ import annotations

from typing import Any

import pytest

from openelm_mlx.benchmarks.hardware import PARTS, bytes_per_token, part_of
from openelm_mlx.engine.loading import Engine
from openelm_mlx.errors import BenchmarkError, CacheError, OpenELMError
from openelm_mlx.files import read_json, read_places
from openelm_mlx.model.config import OpenELMConfig

# one layer: 2 query heads, 1 key/value head of 64; FFN 256 wide; 128 -> 128; 1000 tokens
ONE = OpenELMConfig(
    model_dim=128,
    head_dim=64,
    num_transformer_layers=1,
    vocab_size=1000,
    num_query_heads=(2,),
    num_kv_heads=(1,),
    ffn_dims=(256,),
    num_gqa_groups=2,
)


def test_one_layer_by_hand() -> None:
    found = bytes_per_token(ONE, "bfloat16", None, 10)
    assert found == {
        "embedding": 2 * (1000 * 128 + 128),  # the head, and the row looked up
        "attention": 2
        * (256 * 128 + 128 * 128),  # qkv_proj [4 heads * 64, 128], out_proj [128, 2 heads * 64]
        "ffn": 2 * (512 * 128 + 128 * 256),
        "norms": 2 * (64 + 64 + 128 + 128 + 128),
        "scales": 0,
        "kv": 2 * 2 * 1 * 64 * 10,  # key and value, 2 bytes, 1 head of 64, 10 tokens
    }
    assert list(found) == list(PARTS)


def test_quantized_by_hand() -> None:
    form = {
        "bits": 4,
        "group_size": 64,
        "transformer.layers.0.ffn.proj_2": {"bits": 8, "group_size": 32},
        "transformer.token_embeddings": False,
    }
    found = bytes_per_token(ONE, "float32", form, 0)
    assert found["attention"] == (256 * 128 + 128 * 128) / 2
    assert found["ffn"] == 512 * 128 / 2 + 128 * 256
    assert found["embedding"] == 4 * (1000 * 128 + 128)
    assert found["scales"] == 2 * 4 * ((256 * 2 + 128 * 2 + 512 * 2) + 128 * 256 / 32)
    assert found["kv"] == 0


@pytest.mark.parametrize(
    ("form", "scales"),
    [
        ({"bits": 4, "group_size": 32, "mode": "mxfp4"}, 1),
        ({"bits": 4, "group_size": 16, "mode": "nvfp4"}, 1),
        ({"bits": 8, "group_size": 32, "mode": "affine"}, 4),
    ],
)
def test_block_formats_have_one_byte_of_scale(form: dict[str, Any], scales: int) -> None:
    groups = (256 * 128 + 128 * 128 + 512 * 128 + 128 * 256 + 1000 * 128 + 128) / form["group_size"]
    assert bytes_per_token(ONE, "bfloat16", form)["scales"] == scales * groups


def test_an_untied_head_is_read_whole_and_the_embedding_by_the_row() -> None:
    untied = OpenELMConfig(**{**ONE.__dict__, "share_input_output_layers": False})
    assert bytes_per_token(untied, "bfloat16") == bytes_per_token(ONE, "bfloat16")


def test_quantized_keys_and_values() -> None:
    whole, packed = (
        bytes_per_token(ONE, "bfloat16", None, 100, kv_bits=bits)["kv"] for bits in (None, 8)
    )
    assert (whole, packed) == (2 * 2 * 64 * 100, 2 * (64 + 4) * 100)
    odd = OpenELMConfig(**{**ONE.__dict__, "head_dim": 96})  # groups of 32, as 64 do not divide it
    assert bytes_per_token(odd, "bfloat16", None, 100, kv_bits=8)["kv"] == 2 * (96 + 12) * 100
    with pytest.raises(
        CacheError, match="kv_bits 8 needs heads of a multiple of 32; this model's have 40"
    ):
        bytes_per_token(
            OpenELMConfig(**{**ONE.__dict__, "head_dim": 40}), "bfloat16", None, 100, kv_bits=8
        )


def test_the_bundled_model_reads_what_its_file_holds(tiny: Engine) -> None:
    sizes = {name: place.info.nbytes for name, place in read_places(tiny.path).items()}
    stored = read_json(tiny.path / "config.json")
    dtype = {2: "float16", 4: "float32"}[sizes["transformer.norm.weight"] // tiny.config.model_dim]
    found = bytes_per_token(tiny.config, dtype, stored["quantization"])
    row = {
        part: sum(
            size
            for name, size in sizes.items()
            if "token_embeddings" in name and part_of(name) == part
        )
        / tiny.config.vocab_size
        for part in ("embedding", "scales")
    }
    for part in ("embedding", "attention", "ffn", "norms", "scales"):
        assert found[part] == pytest.approx(
            sum(s for name, s in sizes.items() if part_of(name) == part) + row.get(part, 0)
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "int8"}, "dtype is 'int8'; allowed: float32, bfloat16, float16"),
        ({"dtype": "float32", "context_tokens": -1}, "context_tokens is -1"),
        (
            {"dtype": "float32", "quantization": {"bits": 4, "group_size": 96}},
            "4 bits in groups of 96, which MLX does not have in mode affine",
        ),
        (
            {"dtype": "float32", "quantization": {"bits": 4}},
            "config.json has a quantization without group_size",
        ),
    ],
)
def test_what_cannot_be_sized(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(OpenELMError, match=message):
        bytes_per_token(ONE, **arguments)


def test_rows_that_groups_do_not_fit_are_refused() -> None:
    narrow = OpenELMConfig(**{**ONE.__dict__, "model_dim": 96})
    with pytest.raises(BenchmarkError, match="has rows of 96, not a multiple of group_size 64"):
        bytes_per_token(narrow, "float32", {"bits": 4, "group_size": 64})
