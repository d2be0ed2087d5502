"""llama.cpp's types of blocks: which matrix gets which, what is lost, and where every bit goes.

The expected mixtures and errors are those of llama.cpp's own quantizer (llama_model_quantize of
release b9190, without an importance matrix), written down here because it need not be installed.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from formats import WIDE, again, random_folder, weights
from golden_set import NANO

from openelm_mlx.cli import main
from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.convert.options import GGUF_TYPES
from openelm_mlx.convert.quantize import kquants
from openelm_mlx.convert.sources.gguf import GGUFFile
from openelm_mlx.convert.targets.gguf import as_blocks, encoded, gguf_names
from openelm_mlx.convert.targets.gguf_types import types_of
from openelm_mlx.device import mx
from openelm_mlx.errors import ConversionError, OptionError
from openelm_mlx.model.config import OpenELMConfig

DEEP = replace(WIDE, num_transformer_layers=16)
ENDS_AND_THIRDS = (0, 1, 4, 7, 10, 13, 14, 15)  # of 16 layers
# the types that llama.cpp gave the matrices of such a model, and the layers that got the better one
MIXTURES = {
    "Q2_K": ("Q4_K Q3_K Q2_K Q3_K", "", (), ()),
    "Q3_K_S": ("Q3_K Q3_K Q3_K Q3_K", "", (), ()),
    "Q3_K_M": ("Q4_K Q4_K Q3_K Q4_K", "Q5_K", (0, 1), (0,)),
    "Q3_K_L": ("Q5_K Q5_K Q3_K Q5_K", "", (), ()),
    "Q4_0": ("Q4_0 Q4_0 Q4_0 Q4_0", "", (), ()),
    "Q4_K_S": ("Q4_K Q4_K Q4_K Q4_K", "Q5_K", (0, 1, 2, 3), (0, 1)),
    "Q4_K_M": ("Q4_K Q4_K Q4_K Q4_K", "Q6_K", ENDS_AND_THIRDS, ENDS_AND_THIRDS),
    "IQ4_NL": ("Q5_K IQ4_NL IQ4_NL IQ4_NL", "Q5_K", (), (0, 1)),
    "IQ4_XS": ("Q5_K IQ4_XS IQ4_XS IQ4_XS", "Q5_K", (), (0, 1)),
    "Q5_0": ("Q5_0 Q5_0 Q5_0 Q5_0", "", (), ()),
    "Q5_K_S": ("Q5_K Q5_K Q5_K Q5_K", "", (), ()),
    "Q5_K_M": ("Q5_K Q5_K Q5_K Q5_K", "Q6_K", ENDS_AND_THIRDS, ENDS_AND_THIRDS),
    "Q6_K": ("Q6_K Q6_K Q6_K Q6_K", "", (), ()),
    "Q8_0": ("Q8_0 Q8_0 Q8_0 Q8_0", "", (), ()),
}
# squared error of normal weights, by their variance
ERRORS = {
    "Q2_K": 0.087957,
    "Q3_K": 0.022789,
    "Q4_K": 0.005097,
    "Q5_K": 0.001305,
    "Q6_K": 0.000315,
    "IQ4_NL": 0.005798,
    "IQ4_XS": 0.005888,
}


@pytest.mark.parametrize("mixture", GGUF_TYPES)
def test_each_matrix_gets_the_type_that_llama_cpp_gives_it(mixture):
    found = types_of(mixture, DEEP)
    roles, better, *layers = MIXTURES[mixture]
    for role, kind, chosen in zip(
        ("attn.qkv_proj", "attn.out_proj", "ffn.proj_1", "ffn.proj_2"),
        roles.split(),
        (layers[0], (), (), layers[1]),
        strict=True,
    ):
        got = [found[f"transformer.layers.{n}.{role}.weight"] for n in range(16)]
        assert got == [better if n in chosen else kind for n in range(16)]
    embeddings = found["transformer.token_embeddings.weight"]
    assert embeddings == ("Q8_0" if mixture == "Q8_0" else "Q6_K")
    assert found["transformer.layers.3.ffn_norm.weight"] == "F32"


def test_rows_that_256_does_not_divide(capsys, tmp_path):
    """Nano's have 128 weights, but for the 512 and 256 of ffn.proj_2."""
    config = OpenELMConfig.from_file(again(NANO / "checkpoint.pt", tmp_path / "m") / "config.json")
    assert Counter(types_of("Q4_K_M", config).values()) == Counter(
        F32=17, Q8_0=3, Q5_0=10, Q4_K=2, Q6_K=2
    )
    assert Counter(types_of("Q2_K", config).values()) == Counter(F32=17, Q8_0=1, Q4_0=12, Q3_K=4)
    assert "Q5_1" in types_of("Q5_K_S", config).values()
    command = ["convert", str(NANO / "checkpoint.pt"), "-o", str(tmp_path / "x.gguf")]
    assert main([*command, "--gguf-type", "IQ4_XS"]) == 0
    said = "matrices whose rows 256 does not divide: Q8_0 in place of Q6_K (1), IQ4_NL in place of "
    assert said + "IQ4_XS (12)" in capsys.readouterr().out


def test_rows_of_which_no_block_can_be_made():
    narrow = replace(WIDE, model_dim=24, ffn_dim_divisor=8)
    message = "has rows of 24 weights, which is not a multiple of Q8_0's 32; leave out --gguf-type"
    with pytest.raises(ConversionError, match=message):
        types_of("Q4_K_M", narrow)
    assert types_of("F16", narrow)["transformer.token_embeddings.weight"] == "F16"


@pytest.mark.parametrize("kind", kquants.KINDS)
def test_no_more_is_lost_than_by_llama_cpp(kind):
    """The gguf package decodes the blocks, so that this tests the place of every bit as well."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    rows = np.random.default_rng(7).standard_normal((64, 512)).astype(np.float32)
    blocks = as_blocks(rows, kind)
    error = dequantize(blocks, GGMLQuantizationType[kind]) - rows
    assert (error**2).mean() < ERRORS[kind]
    # zeros, one weight only, all alike, the smallest and the largest numbers
    odd = np.zeros((8, 256), np.float32)
    odd[1, 5], odd[2], odd[3], odd[4], odd[5, ::2] = 1, 0.25, -0.25, 1e-38, 60000
    odd[6], odd[7] = np.linspace(1, 2, 256), -np.linspace(1, 2, 256)
    found = dequantize(as_blocks(odd, kind), GGMLQuantizationType[kind])
    steps = {"Q2_K": 3, "Q3_K": 4, "Q5_K": 31, "Q6_K": 32}.get(kind, 7)
    assert not found[0].any() and np.isfinite(found).all()
    bound = np.abs(odd).max(axis=1) / steps + 2**-24  # the smallest number of float16
    assert (np.abs(found - odd).max(axis=1) <= bound).all()


@pytest.mark.parametrize("kind", ["Q4_K_M", "Q2_K", "IQ4_XS"])
def test_a_file_of_a_mixture_is_written_read_and_verified(tmp_path, kind):
    import gguf

    source = random_folder(tmp_path / "s", WIDE, spread=0.05)
    (text := tmp_path / "text").write_text("two birds flew in a forest " * 4)
    fields = {"gguf_type": kind, "verify_text": text}
    report = convert(ConvertOptions(source, tmp_path / "x.gguf", **fields))
    planned = convert(
        ConvertOptions(source, tmp_path / "y.gguf", gguf_type=kind, dry_run=True)
    ).written_bytes
    reader = gguf.GGUFReader(tmp_path / "x.gguf")
    assert reader.fields["general.file_type"].contents() == gguf.LlamaFileType[f"MOSTLY_{kind}"]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert planned == report.written_bytes == sum(int(t.n_bytes) for t in reader.tensors)
    assert not report.notes and 0 < report.verification["mean_kl_divergence"] < 1
    file, original = GGUFFile(tmp_path / "x.gguf"), weights(source)
    for name, expected in types_of(kind, WIDE).items():
        parts = [tensors[of] for of in gguf_names(name)]
        assert {part.tensor_type.name for part in parts} == {expected}
        found = np.concatenate([gguf.quants.dequantize(p.data, p.tensor_type) for p in parts])
        np.testing.assert_array_equal(np.array(file.load_exact(name)), found)
        error = np.mean((found - np.array(original[name])) ** 2)
        assert error <= ERRORS.get(expected, 0) * 0.05**2 * 1.1


def test_rows_are_encoded_alike_in_any_number_at_a_time():
    rows = mx.random.normal((300, 512), key=mx.random.key(0))
    apart = [as_blocks(np.array(part), "Q4_K") for part in (rows[:1], rows[1:40], rows[40:])]
    np.testing.assert_array_equal(encoded("w", rows, "Q4_K"), np.concatenate(apart))


def test_weights_beyond_the_range_of_a_type():
    with pytest.raises(ConversionError, match="w has weights beyond the range of Q4_K; use --dtyp"):
        encoded("w", mx.full((1, 256), 1e6), "Q4_K")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"gguf_type": "Q4_K"}, "gguf_type is 'Q4_K'; allowed: Q8_0, Q6_K, Q5_K_M"),
        ({"gguf_type": "Q6_K", "bits": 8}, "--bits or --mode and --gguf-type each choose the plan"),
        (
            {"gguf_type": "Q6_K", "target": "m"},
            "--gguf-type Q6_K is a type of GGUF files; leave it out, or give --to gguf",
        ),
        ({"gguf_type": "Q6_K", "calibrate": "gptq"}, "--to gguf quantizes by --gguf-type"),
        ({"calibrate": "gptq"}, "--to gguf quantizes by --gguf-type; leave out"),
    ],
)
def test_options_that_do_not_fit_a_type(fields, message):
    with pytest.raises(OptionError, match=message):
        ConvertOptions(**{"source": "a", "target": "b.gguf", **fields})
