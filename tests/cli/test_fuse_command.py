"""`openelm fuse`: a merged model is what its base is with the adapter, and what is refused."""

from __future__ import annotations

import json

import pytest
from adapter_folders import mlx_lm_folder

from openelm_mlx import load
from openelm_mlx.cli import main
from openelm_mlx.device import mx
from openelm_mlx.engine.hub import BUNDLED
from openelm_mlx.model.config import OpenELMConfig

TOKENS = mx.array([[1, 5, 9, 7]])


@pytest.fixture(scope="module")
def adapter(nano, tmp_path_factory):
    """An adapter of the nano model's."""
    config = OpenELMConfig.from_file(nano / "config.json")
    return mlx_lm_folder(tmp_path_factory.mktemp("adapters") / "mine", config)


def fuse(*words: object) -> int:
    return main(["fuse", *map(str, words)])


def test_a_fused_model_computes_what_its_base_does_with_the_adapter(
    nano, adapter, tmp_path, capsys
):
    assert fuse(nano, "--adapter", adapter, "-o", tmp_path / "out", "--json") == 0
    said = json.loads(capsys.readouterr().out)
    assert said["written"] and said["quantization"] is None
    wanted = load(nano, adapter=adapter).model(TOKENS)
    found = load(tmp_path / "out").model(TOKENS)
    assert mx.abs(found - wanted).max() < 1e-5 * mx.abs(wanted).max()
    assert mx.abs(found - load(nano).model(TOKENS)).max() > 1e-3 * mx.abs(wanted).max()
    assert fuse(nano, "--adapter", adapter, "-o", tmp_path / "out") == 2
    assert "out exists; choose another folder, or replace it with" in capsys.readouterr().err


def test_what_happens_to_a_quantized_base_is_said(tmp_path, capsys):
    mlx_lm_folder(tmp_path / "mine", OpenELMConfig.from_file(BUNDLED / "config.json"))
    words = ("openelm-tiny", "--adapter", tmp_path / "mine", "-o", tmp_path / "out", "--dry-run")
    assert fuse(*words) == 0
    last = "32 matrices that were quantized are now in full precision; --bits quantizes them again"
    assert capsys.readouterr().out.splitlines()[-1] == last
    assert fuse(*words, "--bits", "8") == 0
    said = capsys.readouterr().out
    assert "32 matrices are rounded a second time" in said and "full precision" not in said
    assert fuse(*words, "--json") == 0
    assert json.loads(capsys.readouterr().out)["dequantized"] == 32


def test_an_adapter_that_is_not_there_or_of_another_base_is_refused(
    nano, adapter, tmp_path, capsys
):
    assert fuse("270m", "--adapter", tmp_path / "none", "-o", tmp_path / "out") == 2
    assert capsys.readouterr().err == (  # and nothing is fetched
        f"openelm: --adapter {tmp_path}/none does not exist; give the folder of an adapter, as "
        "`openelm finetune` writes it\n"
    )
    assert fuse("openelm-tiny", "--adapter", adapter, "-o", tmp_path / "out") == 2
    assert "was made for another model" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
