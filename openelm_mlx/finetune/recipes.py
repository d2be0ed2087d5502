"""Recipes that Apple published for OpenELM, as options of a fine-tuning.

`corenet-lora` and `corenet-dora` are those of CoreNet's commonsense adapters, and `instruct-dpo`
is that of the Instruct models. Apple trained on 8 GPUs: accumulation makes the same step on one
machine, of 128 examples or pairs. What differs:

- The data are the user's own; what is as long as Apple's is the training, in epochs.
- Apple cut examples at the length of a row, and prompts at 512 tokens, to their end. Here they are
  refused or split by the options `overlong` and `length`.
- Of a pair the last answer is trained; Apple counted the mark of the assistant's turn before it as
  well, which both answers share.
- A step of CoreNet's is the mean of the means of batches; here a token counts the same in all.
- CoreNet trained without validation; by default a share of the examples is held out here.
- Both computed in bfloat16, with weights in float32. On a GPU, --dtype is the type of the passes,
  and with the method full that of the weights as well.

Nothing here needs MLX.
"""

from __future__ import annotations

from typing import Any

from openelm_mlx.model.config import OpenELMConfig

SMALLEST = "270m"
EVERY_MATRIX = ("token_embeddings", "qkv_proj", "out_proj", "proj_1", "proj_2")

# apple/corenet, projects/openelm/peft_configs/openelm_lora_{270M,450M,1_1B,3B}.yaml
CORENET: dict[str, Any] = {
    "rank": 32,
    "alpha": 32.0,
    "dropout": 0.1,
    "targets": EVERY_MATRIX,
    "train_on": "all",  # of the loss only padding is left out (ignore_index)
    "length": 2048,
    "packing": False,  # each text is padded to a row
    "batch": 8,  # train_batch_size0, of a GPU
    "accumulate": 16,  # accum_freq 2, times 8 GPUs
    "epochs": 3.0,  # "Train for 3 epochs"
    "optimizer": "adamw",
    "learning_rate": 3e-4,
    "schedule": "cosine",
    "warmup": 1000 / 4375,  # warmup_iterations of max_iterations, for data of any size
    "warmup_rate": 1e-6,
    "final_rate": 3e-5,
    "weight_decay": 0.0,
    "beta1": 0.9,
    "beta2": 0.95,
    "epsilon": 1e-8,
    "clip": 1.0,
    "z_loss": 1e-4,  # the default of z_loss_eps, corenet/loss_fn/language_modeling/cross_entropy.py
}
# apple/corenet, projects/openelm/instruction_tuning/openelm-instruct.yaml, for scripts/run_dpo.py
# of huggingface/alignment-handbook at 70769f9; what neither states is the default of transformers'
# TrainingArguments: the betas and epsilon of Adam, weight decay, clipping and the last rate
INSTRUCT: dict[str, Any] = {
    "method": "full",
    "length": 1024,
    "packing": False,
    "batch": 8,  # per_device_train_batch_size
    "accumulate": 16,  # gradient_accumulation_steps 2, times 8 GPUs (deepspeed_zero3.yaml)
    "optimizer": "adamw",
    "schedule": "cosine",
    "warmup": 0.1,
    "warmup_rate": 0.0,
    "final_rate": 0.0,
    "weight_decay": 0.0,
    "beta1": 0.9,
    "beta2": 0.999,
    "epsilon": 1e-8,
    "clip": 1.0,
    "gradient_checkpointing": True,
    "beta": 0.01,
}
# apple/corenet, projects/openelm/README-instruct.md
INSTRUCT_BY_SIZE: dict[str, dict[str, Any]] = {
    "270m": {"epochs": 5.0, "learning_rate": 2e-5, "preference": "hinge"},
    "450m": {"epochs": 8.0, "learning_rate": 3e-5, "preference": "hinge"},
    "1.1b": {"epochs": 5.0, "learning_rate": 5e-5, "preference": "sigmoid"},
    "3b": {"epochs": 10.0, "learning_rate": 1e-4, "preference": "hinge"},
}
RECIPES = ("corenet-lora", "corenet-dora", "instruct-dpo")


def settings_of(recipe: str, size: str | None = None) -> dict[str, Any]:
    """Return the options of a recipe for a published size, one of `INSTRUCT_BY_SIZE`.

    A model of another size takes those of the smallest, which has the lowest learning rate.
    """
    size = size or SMALLEST
    if recipe == "instruct-dpo":
        return INSTRUCT | INSTRUCT_BY_SIZE[size]
    # activation_checkpointing is off for the smallest only
    own = {"gradient_checkpointing": size != SMALLEST}
    return {"method": recipe.removeprefix("corenet-")} | CORENET | own


def note(recipe: str | None, config: OpenELMConfig) -> str:
    """Return what is to be said about a recipe on a model that is none of Apple's, or ""."""
    if recipe is None or config.size is not None:
        return ""
    return f"{recipe} is for Apple's sizes; this model takes what it says for {SMALLEST}."
