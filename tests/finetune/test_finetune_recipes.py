"""Recipes: each number is Apple's, and every size gets its own."""

from __future__ import annotations

import pytest

from openelm_mlx.finetune.options import FinetuneOptions
from openelm_mlx.finetune.recipes import RECIPES, note
from openelm_mlx.model.config import PUBLISHED, OpenELMConfig

SMALL = OpenELMConfig(num_transformer_layers=2, model_dim=128, head_dim=64, max_context_length=512)
# projects/openelm/README-instruct.md: epochs, learning rate, loss
INSTRUCT = {
    "270m": (5, 2e-5, "hinge"),
    "450m": (8, 3e-5, "hinge"),
    "1.1b": (5, 5e-5, "sigmoid"),
    "3b": (10, 1e-4, "hinge"),
}


@pytest.mark.parametrize("size", PUBLISHED)
def test_the_instruct_recipe_of_each_size(size):
    config = OpenELMConfig.from_name(size)
    found = FinetuneOptions.of(config, recipe="instruct-dpo")
    assert (found.epochs, found.learning_rate, found.preference) == INSTRUCT[size]
    assert (found.method, found.beta, found.length, found.warmup) == ("full", 0.01, 1024, 0.1)
    assert found.batch * found.accumulate == 8 * 2 * 8
    assert (found.beta2, found.weight_decay, found.final_rate) == (0.999, 0, 0)
    assert note("instruct-dpo", config) == note(None, SMALL) == ""


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_recipe_of_corenet(method):
    found = FinetuneOptions.of(OpenELMConfig.from_name("450m"), recipe=f"corenet-{method}")
    assert (found.method, found.rank, found.scale, found.dropout) == (method, 32, 1, 0.1)
    assert len(found.targets) == 5 and "token_embeddings" in found.targets
    assert (found.warmup_rate, found.learning_rate, found.final_rate) == (1e-6, 3e-4, 3e-5)
    assert (found.epochs, found.warmup, found.z_loss) == (3, 1000 / 4375, 1e-4)
    assert (found.beta1, found.beta2, found.epsilon, found.clip) == (0.9, 0.95, 1e-8, 1)
    assert (found.length, found.train_on, found.batch * found.accumulate) == (2048, "all", 128)
    assert found.gradient_checkpointing
    smallest = FinetuneOptions.of(OpenELMConfig.from_name("270m"), recipe=f"corenet-{method}")
    assert not smallest.gradient_checkpointing


def test_a_model_of_another_size_takes_what_the_smallest_takes():
    for recipe in RECIPES:
        found = FinetuneOptions.of(SMALL, recipe=recipe)
        assert found.length == 512  # a row is no longer than the context
        own = FinetuneOptions.of(OpenELMConfig.from_name("270m"), recipe=recipe, length=512)
        assert found == own
    assert note("instruct-dpo", SMALL) == (
        "instruct-dpo is for Apple's sizes; this model takes what it says for 270m."
    )
