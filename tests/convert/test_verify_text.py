"""Verification on the text of the package: what the text is, that wrong weights are found, and that
models read layer by layer give the figures of whole ones.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from golden_set import GOLDEN, NANO

from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.convert.opening import open_model
from openelm_mlx.convert.quantize import exact_weights
from openelm_mlx.convert.verify import check_bound, read_folder, verification_text, verify
from openelm_mlx.device import mx
from openelm_mlx.errors import ConversionError
from openelm_mlx.evaluate.compare import compare, with_interval
from openelm_mlx.evaluate.perplexity import TEXT
from openelm_mlx.model.decoder import OpenELM

TOKENIZER = NANO / "tokenizer.model"


@pytest.fixture(scope="module")
def eight_bits(tmp_path_factory):
    """OpenELM Nano in 8 bits, its record, and its source."""
    folder = tmp_path_factory.mktemp("eight") / "m"
    options = ConvertOptions(NANO / "checkpoint.pt", folder, bits=8, max_kl=1e-3, verify=True)
    convert(options)
    return folder, json.loads((folder / "conversion.json").read_text()), open_model(options)


def test_the_text_has_two_thousand_tokens_and_intervals(eight_bits):
    folder, record, opened = eight_bits
    losses = record["verification"]
    known = opened.tokenizer.processor.encode(TEXT.read_text(encoding="utf-8"))
    assert losses["tokens"] == len(known) == 2806
    assert (TEXT.parent / "SOURCE.md").read_text().count("2,806 tokens") == 1
    card = (folder / "README.md").read_text()
    for name in ("mean_kl_divergence", "top_1_agreement", "perplexity", "perplexity_of_source"):
        low, high = losses["intervals_95"][name]
        assert low < losses[name] < high
        assert f"| {with_interval(losses, name)} |" in card
    assert f"on {record['verification_text']}:" in card and "Darwin" in record["verification_text"]


def flipped(weights, stem):
    for part in ("scales", "biases"):
        weights[f"{stem}.{part}"] = -weights[f"{stem}.{part}"]


def exchanged(weights, stem):
    for part in ("weight", "scales", "biases"):
        rows = weights[f"{stem}.{part}"]
        weights[f"{stem}.{part}"] = mx.concatenate([rows[64:128], rows[:64], rows[128:]])


@pytest.mark.parametrize(
    ("wrong", "stem", "batches"),
    [
        (exchanged, "layers.0.attn.qkv_proj", None),  # what shows least of all
        (flipped, "layers.1.attn.out_proj", slice(-1, None)),
    ],
)
def test_wrong_weights_are_found(eight_bits, tmp_path, wrong, stem, batches):
    folder, _, opened = eight_bits
    weights = dict(mx.load(str(folder / "model.safetensors")))
    wrong(weights, f"transformer.{stem}")
    mx.save_safetensors(str(tmp_path / "model.safetensors"), weights)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    text = None if batches is None else verification_text(opened)[batches]
    with pytest.raises(ConversionError, match="tokens is 0.* nats, above --max-kl 0.001"):
        check_bound(verify(tmp_path, opened, text), 1e-3)


def test_layer_by_layer_gives_the_figures_of_whole_models_in_less_memory(tmp_path):
    options = ConvertOptions(
        GOLDEN / "openelm-tiny" / "checkpoint.pt", tmp_path / "m", bits=4, tokenizer=TOKENIZER
    )
    convert(options)
    opened, told = open_model(options), []
    batches = [tokens[:1, :96] for tokens in verification_text(opened)[:2]]
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    found = verify(tmp_path / "m", opened, batches, lambda *step: told.append(step))
    used, models = mx.get_peak_memory() - before, []
    for config, weights in ((opened.trimmed, exact_weights(opened)), read_folder(tmp_path / "m")):
        models.append(OpenELM(config))
        models[-1].load_weights(list(weights.items()))
    expected = asdict(compare(*models, batches))
    expected["perplexity_of_source"] = expected.pop("reference_perplexity")
    assert found.pop("intervals_95") == expected.pop("intervals_95") == {}
    assert found == pytest.approx(expected, rel=1e-3)
    assert used < 4 * opened.trimmed.num_parameters  # of one model in float32, not of two
    assert told[0] == (1, 18, "verifying layer 0") and told[15] == (16, 18, "verifying layer 7")
    assert told[16:] == [(17, 18, "verifying logits"), (18, 18, "verifying logits")]
