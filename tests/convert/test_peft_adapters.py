"""PEFT's adapters in a conversion: merged, kept beside the base in either form, turned into
mlx-lm's and back; an adapter of another base is refused.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from adapter_folders import EMBEDDINGS, ROLES, mlx_lm_folder, peft_folder
from formats import TINY, again, mlx_lm_logits, our_logits, random_folder

from openelm_mlx import load
from openelm_mlx.cli import main
from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.device import mx
from openelm_mlx.engine.adapter_files import read_adapter
from openelm_mlx.engine.hub import BUNDLED
from openelm_mlx.errors import ConversionError, OpenELMError, OptionError
from openelm_mlx.model.adapters import adapted
from openelm_mlx.model.config import OpenELMConfig
from openelm_mlx.model.decoder import OpenELM

TWO = replace(TINY, num_transformer_layers=2, vocab_size=64)
TOKENS = np.array([[1, 5, 9, 33, 2, 60]])
EMBEDDED = ("embedding", *ROLES)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return random_folder(tmp_path_factory.mktemp("base") / "b", TWO, spread=0.3)


def applied(base: Path, folder: Path) -> np.ndarray:
    """Return the logits of the base with an adapter beside its weights."""
    model = OpenELM(OpenELMConfig.from_file(base / "config.json"))
    model.load_weights(str(base / "model.safetensors"))
    return np.array(adapted(model, read_adapter(folder, model.args))(mx.array(TOKENS)))


def is_tied(folder: Path) -> bool:
    return OpenELMConfig.from_file(folder / "config.json").share_input_output_layers


def difference(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).max() / np.abs(other).max())


KINDS = {
    "lora": {"roles": ROLES},
    "rs": {"roles": ROLES, "use_rslora": True},
    "dora": {"roles": ROLES, "use_dora": True},
    "ranks": {"roles": ROLES, "ranks": {"transformer.layers.1.ffn.proj_1": 2}},
    "embedding": {"roles": EMBEDDED},
    "columns": {"roles": EMBEDDED, "use_dora": True},
    "head": {"roles": ("head", *ROLES)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_merged_kept_and_applied_are_one_model(tmp_path, base, kind):
    folder = peft_folder(tmp_path / "a", TWO, **KINDS[kind])
    expected = applied(base, folder)
    assert difference(our_logits(base, TOKENS), expected) > 0.05
    merged = again(base, tmp_path / "m", adapter_folder=folder)
    hf = again(base, tmp_path / "h", adapter_folder=folder, adapter="keep", target_format="hf")
    assert is_tied(merged) == (kind not in ("embedding", "columns", "head"))
    assert is_tied(hf) == (kind != "head")
    found = {
        "merged": our_logits(merged, TOKENS),
        "merged, in mlx-lm": mlx_lm_logits(merged, TOKENS),
        "kept for PEFT": applied(hf, hf / "adapter"),
    }
    if kind != "columns":  # of which mlx-lm knows nothing
        kept = again(base, tmp_path / "k", adapter_folder=folder, adapter="keep")
        assert is_tied(kept) == is_tied(merged)
        later = again(kept, tmp_path / "l", adapter_folder=kept / "adapter")
        found |= {
            "kept, in mlx-lm": mlx_lm_logits(kept, TOKENS, kept / "adapter"),
            "kept, applied here": applied(kept, kept / "adapter"),
            "kept, then merged": our_logits(later, TOKENS),
        }
    assert {
        way: value for way, x in found.items() if (value := difference(x, expected)) > 1e-5
    } == {}
    one, other = (mx.load(str(of / "adapter_model.safetensors")) for of in (folder, hf / "adapter"))
    assert one.keys() == other.keys()
    assert all(mx.array_equal(array, other[name]) for name, array in one.items())


def test_both_sides_of_a_tied_embedding_for_peft(tmp_path, base):
    """mlx-lm adapts both sides; PEFT can too, once the head has a matrix of its own."""
    folder = mlx_lm_folder(tmp_path / "a", TWO, EMBEDDED)
    expected = mlx_lm_logits(base, TOKENS, folder)
    merged = again(base, tmp_path / "m", adapter_folder=folder)
    hf = again(base, tmp_path / "h", adapter_folder=folder, adapter="keep", target_format="hf")
    assert is_tied(merged) and not is_tied(hf)
    for logits in (applied(base, folder), our_logits(merged, TOKENS), applied(hf, hf / "adapter")):
        assert difference(logits, expected) < 1e-5


def test_a_quantized_embedding_that_is_untied_stays_packed(tmp_path, base):
    """Only the embedding's input side is merged: its head keeps the stored codes."""
    quantized = again(base, tmp_path / "q", bits=8, group_size=32)
    folder = peft_folder(tmp_path / "a", TWO, ["embedding"])
    merged = again(quantized, tmp_path / "m", adapter_folder=folder)
    before, after = (mx.load(str(of / "model.safetensors")) for of in (quantized, merged))
    for leaf in ("weight", "scales", "biases"):
        assert mx.array_equal(after[f"lm_head.{leaf}"], before[f"{EMBEDDINGS}.{leaf}"])
    assert after[f"{EMBEDDINGS}.weight"].dtype == mx.float32


def test_an_adapter_of_another_base(tmp_path, base):
    """The fingerprint holds for the base in other types, and quantized; it survives a change of
    form.
    """
    folder = peft_folder(tmp_path / "a", TWO)
    kept = again(base, tmp_path / "k", adapter_folder=folder, adapter="keep") / "adapter"
    turned = again(kept, tmp_path / "t", target_format="hf", config=base / "config.json")
    other = random_folder(tmp_path / "o", TWO, seed=1)
    again(other, tmp_path / "x", adapter_folder=folder)  # whose files do not say
    for number, of in enumerate((kept, turned)):
        with pytest.raises(ConversionError, match="was made for another model than .*/o: the wei"):
            again(other, tmp_path / "y", adapter_folder=of)
        for settings in ({"dtype": "bfloat16"}, {"bits": 4, "group_size": 32}):
            same = again(base, tmp_path / f"{number}-{len(settings)}", **settings)
            again(same, tmp_path / f"{number}-{len(settings)}-m", adapter_folder=of)
    assert not (tmp_path / "y").exists()


def test_the_form_changes_without_the_base(tmp_path, base, capsys):
    folder = peft_folder(tmp_path / "a", TWO, ROLES, base_model_name_or_path=str(base))
    assert main(["convert", str(folder), "-o", str(tmp_path / "m")]) == 0
    numbers = sum(a.size for a in mx.load(str(folder / "adapter_model.safetensors")).values())
    shown = capsys.readouterr().out
    assert f"{numbers:,} parameters, {4 * numbers:,} bytes, 32.00 bits" in shown
    assert shown.count("\n") == 1
    settings = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
    assert settings["model"] == str(base)
    expected = applied(base, folder)
    assert difference(mlx_lm_logits(base, TOKENS, tmp_path / "m"), expected) < 1e-5
    back = again(tmp_path / "m", tmp_path / "b", target_format="hf")
    assert difference(applied(base, back), expected) == 0
    again(tmp_path / "m", tmp_path / "b", target_format="hf", force=True)
    (tmp_path / "b" / "notes.txt").write_text("mine")
    with pytest.raises(ConversionError, match="notes.txt, which openelm convert did not write"):
        again(tmp_path / "m", tmp_path / "b", target_format="hf", force=True)
    report = convert(ConvertOptions(source=folder, target=tmp_path / "d", dry_run=True))
    assert report.parameters == numbers and not (tmp_path / "d").exists()


def test_that_an_adapter_converses_is_kept_in_every_form(tmp_path, base):
    folder = peft_folder(tmp_path / "a", TWO)
    (folder / "chat_template.jinja").touch()
    how = {"adapter_folder": folder, "adapter": "keep"}
    kept = again(base, tmp_path / "k", **how)
    again(base, kept, force=True, **how)  # it knows all files as its own
    assert not load(kept).instruct and load(kept, adapter=kept / "adapter").instruct
    turned = again(
        kept / "adapter", tmp_path / "t", target_format="hf", config=base / "config.json"
    )
    assert (turned / "chat_template.jinja").is_file()


def test_the_base_of_an_adapter_may_be_the_bundled_model(tmp_path):
    config = OpenELMConfig.from_file(BUNDLED / "config.json")
    folder = peft_folder(tmp_path / "a", config, ROLES[:1], base_model_name_or_path="openelm-tiny")
    report = convert(ConvertOptions(source=folder, target=tmp_path / "m", dry_run=True))
    assert report.config == config


@pytest.mark.parametrize(
    ("settings", "fields", "message"),
    [
        ({}, {"bits": 4}, "is an adapter, and --bits is for a model; leave it out"),
        ({}, {"adapter_folder": Path("x")}, "is an adapter, and so is x; give the model that the"),
        ({}, {"target_format": "gguf"}, "is an adapter, which becomes no GGUF file; give --to mlx"),
        ({"base_model_name_or_path": None}, {}, "does not name its base, which is no folder"),
        ({"base_model_name_or_path": "me/mine"}, {}, "names its base 'me/mine', which is no folde"),
        ({}, {}, "270m.*made for another model"),
    ],
)
def test_adapters_alone_that_are_refused(tmp_path, settings, fields, message):
    folder = peft_folder(tmp_path / "270m", TWO, **settings)
    with pytest.raises(OpenELMError, match=message):
        convert(ConvertOptions(source=folder, target=tmp_path / "m", **fields))
    assert not (tmp_path / "m").exists()


def test_an_adapter_is_no_model(tmp_path, base):
    folder = peft_folder(tmp_path / "a", TWO)
    with pytest.raises(ConversionError, match="is an adapter, not a model; give its base, and the"):
        load(folder)
    both = Path(shutil.copytree(base, tmp_path / "both"))  # one folder, as on some hubs
    shutil.copytree(folder, both, dirs_exist_ok=True)
    merged = again(both, tmp_path / "m", adapter_folder=both)
    assert difference(our_logits(merged, TOKENS), applied(base, folder)) < 1e-5


def test_options_of_an_adapter_that_do_not_belong(tmp_path, base):
    folder = peft_folder(tmp_path / "a", TWO)
    with pytest.raises(
        OptionError, match="a states its strength; leave out --lora-alpha and --rank"
    ):
        again(base, tmp_path / "m", adapter_folder=folder, lora_alpha=3)
