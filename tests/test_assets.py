"""The bundled model is what its command makes, and has the parts that tools look for."""

from __future__ import annotations

import json
from pathlib import Path

from golden_set import GOLDEN, NANO

from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.device import mx

BUNDLED = Path(__file__).parents[1] / "openelm_mlx" / "assets" / "openelm-tiny"


def test_the_bundled_model_is_small_and_complete():
    names = {path.name for path in BUNDLED.iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "README.md",
        "conversion.json",
        "SOURCE.md",
    }
    assert sum(path.stat().st_size for path in BUNDLED.iterdir()) < 8_000_000


def test_the_bundled_model_is_what_its_command_makes(tmp_path):
    convert(
        ConvertOptions(
            source=GOLDEN / "openelm-tiny" / "checkpoint.pt",
            target=tmp_path / "m",
            bits=8,
            instruct=True,
            tokenizer=NANO / "tokenizer.model",
        )
    )
    for path in (tmp_path / "m").iterdir():
        if path.suffix in (".jinja", ".json", ".model") and path.name != "conversion.json":
            assert path.read_bytes() == (BUNDLED / path.name).read_bytes(), path.name
    made, bundled = (
        mx.load(str(folder / "model.safetensors")) for folder in (tmp_path / "m", BUNDLED)
    )
    assert made.keys() == bundled.keys()
    assert all(mx.array_equal(made[name], bundled[name]) for name in made)
    records = [json.loads((at / "conversion.json").read_text()) for at in (tmp_path / "m", BUNDLED)]
    assert records[0]["bytes"] == records[1]["bytes"]
    few, many = (record["activations"] for record in records)  # tests measure on few tokens
    assert few["tokens"] < 2000 < many["tokens"]
    assert many["largest"] / 2 < few["largest"] <= many["largest"]


def test_the_chat_template_gives_the_instruct_formats_ids():
    import jinja2
    import sentencepiece
    from tokenizers import Tokenizer

    spm = sentencepiece.SentencePieceProcessor(model_file=str(BUNDLED / "tokenizer.model"))
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(
        (BUNDLED / "chat_template.jinja").read_text(encoding="utf-8")
    )
    tokenizer = Tokenizer.from_file(str(BUNDLED / "tokenizer.json"))

    def ids(messages):
        text = template.render(
            messages=messages, bos_token="<s>", eos_token="</s>", add_generation_prompt=True
        )
        return tokenizer.encode(text, add_special_tokens=False).ids

    user, answer = (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": " Good day. "},
    )
    end, ask = spm.encode("\n<|assistant|>\n"), spm.encode("\n<|user|>\nHi")
    assert ids([user]) == [1, *spm.encode("<|system|>\n"), 2, *ask, 2, *end]
    assert ids([{"role": "system", "content": "Be kind."}, user, answer, user]) == [
        1,
        *spm.encode("<|system|>\nBe kind."),
        2,
        *ask,
        2,
        *spm.encode("\n<|assistant|>\n Good day. "),
        2,
        *ask,
        2,
        *end,
    ]


def test_config_is_in_mlx_lms_form():
    raw = json.loads((BUNDLED / "config.json").read_text())
    assert raw["quantization"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    assert (raw["bos_token_id"], raw["eos_token_id"], "auto_map" in raw) == (1, 2, False)
