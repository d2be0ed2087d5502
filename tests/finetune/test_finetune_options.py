"""Options of a fine-tuning: what contradicts is refused, and the nearer of two sources counts."""

from __future__ import annotations

from dataclasses import replace

import pytest
from yaml import safe_dump as dumped

from openelm_mlx.cli.options import Parser, add_flags, given_fields
from openelm_mlx.errors import ConfigError, OptionError
from openelm_mlx.finetune.options import FinetuneOptions
from openelm_mlx.finetune.report import settings

NO_ADAPTER = "method full has no adapter; give lora or dora, or leave it"


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"method": "full", "rank": 8}, f"rank is 8, but {NO_ADAPTER}"),
        ({"method": "full", "dropout": 0.1}, f"dropout is 0.1, but {NO_ADAPTER}"),
        ({"method": "full", "targets": "proj_1"}, f"targets is proj_1, but {NO_ADAPTER}"),
        ({"targets": ()}, "targets is empty; allowed: qkv_proj, out_proj, proj_1, proj_2, token_e"),
        (
            {"method": "dora", "targets": "token_embeddings"},
            "method is dora, but token_embeddings gets LoRA; give another of targets too",
        ),
        ({"epochs": 0}, "epochs is 0.0; allowed is a number above 0"),
        ({"epochs": 2, "steps": 9}, "epochs is 2.0, but steps ends the training; give one of them"),
        (
            {"validation": "held.jsonl", "validation_share": 0.1},
            "validation_share is 0.1, but validation names other examples; give one",
        ),
        (
            {"validation_share": 0, "patience": 3},
            "patience is 3, but validation_share is 0; give it, or validation",
        ),
        (
            {"validation_share": 0, "evaluate_every": 3},
            "evaluate_every is 3, but validation_share is 0; give it, or validation",
        ),
        ({"optimizer": "sgd", "beta2": 0.9}, "beta2 is 0.9, but sgd has none"),
        ({"optimizer": "adam", "weight_decay": 1}, "weight_decay is 1.0, but adam has none"),
        (
            {"schedule": "constant", "final_rate": 1e-5},
            "final_rate is 1e-05, but a constant learning rate ends where it is",
        ),
        (
            {"warmup": 0, "warmup_rate": 1e-6},
            "warmup_rate is 1e-06, but there is no warm-up; give warmup",
        ),
        (
            {"warmup": 2.5},
            "warmup is 2.5; allowed is a whole number of steps, or a share below 1",
        ),
        (
            {"warmup_rate": 1e-3},
            "warmup_rate is 0.001, above the learning rate 0.0003; give a lower one",
        ),
        (
            {"method": "full", "final_rate": 3e-5},
            "final_rate is 3e-05, above the learning rate 2e-05; give a lower one",
        ),
        ({"beta": 0}, "beta is 0; allowed is a number from 1e-06 to 100.0"),
        (
            {"config": "mine.yaml"},
            "config is mine.yaml, but FinetuneOptions.of(engine.config, ...) reads it; give it th",
        ),
        (
            {"recipe": "corenet-lora", "batch": 2},
            "recipe is corenet-lora, but FinetuneOptions.of(engine.config, ...) reads it; give it",
        ),
    ],
)
def test_what_contradicts_is_refused(given, text):
    with pytest.raises(OptionError) as caught:
        FinetuneOptions(**given)
    assert str(caught.value).startswith(text)


def test_defaults_that_follow_from_others():
    assert FinetuneOptions(rank=4).scale == 1
    assert FinetuneOptions(rank=4, alpha=2).scale == 0.5
    assert FinetuneOptions(method="dora").largest_rate == 3e-4
    assert FinetuneOptions(method="full").largest_rate == 2e-5
    assert FinetuneOptions(method="full", learning_rate=1e-4).largest_rate == 1e-4
    settled = FinetuneOptions(rank=4).settled(pairs=True)
    assert (settled.alpha, settled.learning_rate, settled.preference) == (4, 3e-4, "sigmoid")
    settled = FinetuneOptions(method="full").settled(pairs=False)
    assert (settled.alpha, settled.learning_rate, settled.preference) == (None, 2e-5, None)


def test_what_a_card_says_gives_the_options_again(yaml):
    """Also where it says a default of an option that has no meaning beside the others."""
    cases = ({"method": "full", "steps": 5}, {"recipe": "instruct-dpo", "steps": 5})
    for given in (*cases, {"optimizer": "sgd", "validation": "a.jsonl"}):
        options = FinetuneOptions.of(None, **given).settled(pairs="recipe" in given)
        said = {name: one for name, one in settings(options).items() if one not in (None, [])}
        assert FinetuneOptions.of(None, config=yaml(dumped(said))) == options


@pytest.fixture
def yaml(tmp_path):
    """Return what writes a YAML file."""

    def write(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_keyword_over_yaml_over_recipe(yaml):
    path = yaml("recipe: corenet-lora\nrank: 8\nbatch: 2\nlearning_rate: 1e-4\ntargets: [proj_1]\n")
    found = FinetuneOptions.of(None, config=path, batch=3)
    assert (found.batch, found.rank, found.alpha, found.dropout) == (3, 8, 32, 0.1)
    assert (found.learning_rate, found.targets) == (1e-4, ("proj_1",))
    assert (found.recipe, found.config) == ("corenet-lora", None)
    assert replace(found, batch=1).recipe == "corenet-lora"
    assert FinetuneOptions.of(None, config=path, recipe="corenet-dora").method == "dora"
    assert FinetuneOptions.of(None) == FinetuneOptions()


def test_steps_replace_the_epochs_of_a_farther_source(yaml):
    found = FinetuneOptions.of(None, recipe="instruct-dpo", steps=5)
    assert (found.steps, found.epochs) == (5, FinetuneOptions.epochs)
    found = FinetuneOptions.of(None, config=yaml("steps: 5\nvalidation: a.jsonl\n"), epochs=2)
    assert (found.steps, found.epochs) == (None, 2)
    with pytest.raises(OptionError, match="epochs is 2.0, but steps ends the training"):
        FinetuneOptions.of(None, steps=5, epochs=2)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("learning-rate: 1", "unknown option 'learning-rate'; did you mean learning_rate?"),
        ("qqq: 1", "unknown option 'qqq'; known: method, recipe, config, rank,"),
        ("1: 2", "unknown option 1; known: method"),
        ("rank: many", "rank is 'many'; allowed is a whole number from 1 to 4096"),
        ("beta: little", "beta is 'little'; allowed is a number"),
        ("- rank", "there are no options; write each as in `rank: 8`, in its own line"),
        ("", "there are no options; write each as in `rank: 8`, in its own line"),
        ("config: other.yaml", "config is no option of a file; give its options here"),
        ("recipe: mine", "recipe is 'mine'; allowed: corenet-lora, corenet-dora, instruct-dpo"),
    ],
)
def test_a_wrong_file_is_named(yaml, text, error):
    path = yaml(text)
    with pytest.raises(OptionError) as caught:
        FinetuneOptions.of(None, config=path)
    assert str(caught.value).startswith(f"{path}: {error}")


def test_a_contradiction_names_the_sources(yaml, tmp_path):
    path = yaml("method: full\n")
    with pytest.raises(OptionError) as caught:
        FinetuneOptions.of(None, config=path, recipe="corenet-lora")
    assert str(caught.value) == (
        f"rank is 32, but {NO_ADAPTER} (with the recipe corenet-lora and {path})"
    )
    with pytest.raises(OptionError, match=r"rank is 0; allowed is a whole number from 1 to 4096$"):
        FinetuneOptions.of(None, rank=0)
    with pytest.raises(OptionError, match="unknown option 'ranks'; did you mean rank?"):
        FinetuneOptions.of(None, ranks=8)
    with pytest.raises(OptionError, match="recipe is 'lora'; allowed: corenet-lora"):
        FinetuneOptions.of(None, recipe="lora")
    with pytest.raises(OptionError, match="config is ''; allowed is a path in UTF-8"):
        FinetuneOptions.of(None, config="")
    path.write_text("rank: 8\nbatch:\t8\n")
    with pytest.raises(ConfigError, match=r"as YAML: line 2: found character '\\t' that cannot"):
        FinetuneOptions.of(None, config=path)
    with pytest.raises(OptionError, match="alpha is 0.0, and an adapter of no strength learns"):
        FinetuneOptions(alpha=0)
    with pytest.raises(ConfigError, match=r"none\.yaml does not exist"):
        FinetuneOptions.of(None, config=tmp_path / "none.yaml")


def test_flags_give_what_python_gives(yaml):
    parser = Parser(prog="openelm")
    add_flags(parser, FinetuneOptions)
    path = yaml("rank: 4\n")
    words = ["--recipe", "corenet-lora", "--config", str(path), "--targets", "proj_1,proj_2"]
    given = given_fields(FinetuneOptions, parser.parse_args([*words, "--no-packing"]))
    found = FinetuneOptions.of(None, **given)
    assert (found.rank, found.targets, found.packing) == (4, ("proj_1", "proj_2"), False)
