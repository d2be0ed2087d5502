"""The model card of a fine-tuning: its figures are those of the report."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from openelm_mlx.finetune.card import card, write_card
from openelm_mlx.finetune.options import FinetuneOptions
from openelm_mlx.finetune.report import FinetuneReport

REPORT = FinetuneReport(
    folder=Path("somewhere/stories"),
    model="270m",
    options=FinetuneOptions(rank=8, validation=Path("/home/me/held.jsonl"), log=("tensorboard",)),
    parameters=123456,
    base_parameters=271527168,
    data={"name": "pairs.jsonl", "sha256": "ab12", "examples": 1900, "validation_examples": 100},
    length=512,
    processes=1,
    steps=40,
    steps_planned=60,
    epochs=2.0,
    ended="no better validation loss in 3 evaluations",
    first_loss=3.25,
    last_loss=1.5,
    first_validation_loss=3.5,
    last_validation_loss=2.25,
    best_validation_loss=2.0,
    best_step=30,
    tokens=40000,
    trained_tokens=9000,
    seconds=20.0,
    peak_bytes=3_000_000_000,
    predicted_bytes={},
    versions={"openelm-mlx": "1.2.3", "mlx": "0.32.2"},
    notes=("Two examples were left out.",),
)


def test_a_card_has_the_figures_of_the_report(tmp_path):
    for name in ("loss.png", "adapters.safetensors", "chat_template.jinja"):
        (tmp_path / name).touch()
    write_card(tmp_path, REPORT)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) == {
        "base_model": "apple/OpenELM-270M",
        "base_model_relation": "adapter",
        "library_name": "mlx",
        "pipeline_tag": "text-generation",
        "tags": ["mlx", "openelm", "lora"],
    }
    rows = dict(re.findall(r"^\| (.+) \| (.+) \|$", body, re.MULTILINE))
    assert rows == {
        "name": "`pairs.jsonl`",
        "sha256": "`ab12`",
        "examples": "1,900",
        "validation examples": "100",
        "training, at the start": "3.2500",
        "training, at the end": "1.5000",
        "validation, at the start": "3.5000",
        "validation, at the best, step 30": "2.0000",
        "validation, at the end": "2.2500",
    }
    said = " ".join(body.split())
    assert "A LoRA adapter of rank 8 for [apple/OpenELM-270M](https://hugg" in said
    assert "123,456 trainable parameters, beside the 271,527,168 of the model." in said
    assert "40 of 60 steps (no better validation loss in 3 evaluations), or 2 epochs" in said
    assert "2,000 tokens a second, at most 3,000 MB of memory. With openelm-mlx 1.2.3, mlx" in said
    assert "](loss.png)" in said and "- Two examples were left out." in said
    assert "openelm chat apple/OpenELM-270M --adapter PATH_OF_THIS_FOLDER" in said
    assert "mlx_lm.generate --model FOLDER_OF_THE_BASE --adapter-path PATH_OF" in said
    assert "/home/me" not in text and "# stories" in text


def test_the_recipe_of_a_card_makes_the_same_options():
    (block,) = re.findall(r"```yaml\n(.*?)```", card(REPORT, ()), re.DOTALL)
    given = yaml.safe_load(block)
    same = replace(REPORT.options, validation=Path("held.jsonl"), length=512)
    assert FinetuneOptions(**given) == same


@pytest.mark.parametrize(
    ("model", "name"), [("/home/me/my base", "my base"), ("openelm-tiny", "openelm-tiny")]
)
def test_a_base_that_is_not_on_the_hub_is_named_without_its_folders(model, name):
    text = card(replace(REPORT, model=model, best_validation_loss=None), ())
    assert "base_model" not in text and f"rank 8 for `{name}`" in text and "/home" not in text
    assert "mlx_lm" not in text and "at the best" not in text  # an adapter of PEFT's form
    start = 'openelm generate "Once upon a time" --model'  # what was not trained to converse
    assert f"{start} {name} --adapter PATH_OF_THIS_FOLDER\n" in text.replace("'", "")


def test_a_model_is_used_without_its_base():
    full = replace(REPORT, options=FinetuneOptions(method="full"))
    text = card(full, ("chat_template.jinja",))
    assert (
        "base_model_relation: finetune" in text
        and "parameters fine-tuned. Trained with openelm-mlx" in text
    )
    assert "openelm chat PATH_OF_THIS_FOLDER\n" in text and "--adapter" not in text
