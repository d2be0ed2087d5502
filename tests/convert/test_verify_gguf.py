"""Verification of GGUF files: the figures of a folder, from the file's own blocks and keys; above
the bound no file.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from golden_set import NANO

from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.convert.opening import open_model
from openelm_mlx.convert.verify import check_bound, verification_text, verify
from openelm_mlx.device import mx
from openelm_mlx.errors import ConversionError

SOURCE = NANO / "checkpoint.pt"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """A text that is short, as these tests ask for equal figures and not for good ones."""
    path = tmp_path_factory.mktemp("text") / "mine.txt"
    path.write_text("Once upon a time there was a fox. " * 5)
    return path


def run(source: Path, target: Path, **fields):
    return convert(
        ConvertOptions(source=source, target=target, **{"target_format": "gguf", **fields})
    )


def assert_alike(one, other):
    assert one.pop("intervals_95") == other.pop("intervals_95") == {}  # the text is too short
    assert one == pytest.approx(other, rel=1e-3, abs=1e-7)  # a device may sum in another order


@pytest.mark.parametrize("fields", [{}, {"dtype": "float16"}, {"dtype": "bfloat16"}], ids=str)
def test_unquantized_weights_lose_what_a_folder_of_them_loses(tmp_path, text, fields):
    found = run(SOURCE, tmp_path / "x.gguf", verify_text=text, **fields).verification
    folder = run(
        SOURCE, tmp_path / "x", target_format="mlx", verify_text=text, **fields
    ).verification
    assert_alike(found, folder)
    assert (
        (found["max_logit_difference"] == 0) == (found["mean_kl_divergence"] == 0) == (not fields)
    )
    assert abs(found["mean_kl_divergence"]) < 1e-4 and found["top_1_agreement"] > 0.9


def test_q8_0_loses_a_little_and_is_written_below_the_bound(tmp_path, text):
    found = run(SOURCE, tmp_path / "x.gguf", bits=8, verify_text=text, max_kl=1e-3).verification
    assert (
        0 < found["mean_kl_divergence"] < 1e-3
        and found["top_1_agreement"] > 0.9
        and found["tokens"] > 30
    )
    again = run(
        tmp_path / "x.gguf", tmp_path / "y.gguf", verify_text=text, max_kl=0
    ).verification  # its blocks as float32 are exact
    assert again["max_logit_difference"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.gguf", "y.gguf"]


def test_above_the_bound_the_file_that_was_there_stays(tmp_path, text):
    run(SOURCE, tmp_path / "x.gguf")
    before = (tmp_path / "x.gguf").read_bytes()
    with pytest.raises(ConversionError, match="above --max-kl 0; nothing was written"):
        run(SOURCE, tmp_path / "x.gguf", bits=8, verify_text=text, max_kl=0, force=True)
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [before]


def test_norms_are_compared_as_they_lie_in_the_file(tmp_path, text):
    """They are float32 beside half matrices, also where the source mixes types: nothing is lost."""
    run(SOURCE, tmp_path / "m", target_format="mlx", dtype="bfloat16")
    weights = mx.load(str(tmp_path / "m" / "model.safetensors"))
    weights = {
        name: array.astype(mx.float32) * 1.001 if array.ndim == 1 else array
        for name, array in weights.items()
    }
    mx.eval(weights)  # they are read when asked for, and their file is about to be overwritten
    mx.save_safetensors(str(tmp_path / "m" / "model.safetensors"), weights)
    assert (
        run(tmp_path / "m", tmp_path / "x.gguf", verify_text=text).verification[
            "max_logit_difference"
        ]
        == 0
    )


def test_the_file_is_read_with_its_own_configuration(tmp_path, text):
    run(SOURCE, tmp_path / "x.gguf", rope_base=500.0)
    run(SOURCE, tmp_path / "x", rope_base=500.0, target_format="mlx")
    opened = open_model(ConvertOptions(SOURCE, tmp_path / "y"))
    batches = verification_text(opened, text)
    losses = verify(tmp_path / "x.gguf", opened, batches)
    assert losses["mean_kl_divergence"] > 1e-3
    assert_alike(losses, verify(tmp_path / "x", opened, batches))


@pytest.mark.parametrize(
    ("target", "remedy"),
    [("mlx", "take more bits"), ("hf", "--dtype float32$"), ("gguf", "more bits .--gguf-type.")],
)
def test_the_remedy_is_one_that_the_target_has(target, remedy):
    losses = {"tokens": 30, "mean_kl_divergence": 0.1, "intervals_95": {}}
    with pytest.raises(ConversionError, match=f"nothing was written: .*{remedy}"):
        check_bound(losses, 0.01, target, quantized=target != "hf")
