"""Options of a fine-tuning: Python, YAML and the command line build the same object.

Nothing here needs MLX, so that `openelm --help` can list every option.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from openelm_mlx.fields import check_fields, check_unset, explained, option

METHODS = ("lora", "dora", "full")
TARGETS = ("qkv_proj", "out_proj", "proj_1", "proj_2")  # of every layer
EMBEDDINGS = "token_embeddings"
OPTIMIZERS = {  # and those options that not all of them have
    "adamw": ("weight_decay", "beta1", "beta2", "epsilon"),
    "adam": ("beta1", "beta2", "epsilon"),
    "sgd": ("weight_decay", "beta1"),
    "lion": ("weight_decay", "beta1", "beta2"),
    "adafactor": ("weight_decay",),
    "muon": ("weight_decay", "beta1"),
}
SCHEDULES = ("cosine", "linear", "constant")
PREFERENCES = ("sigmoid", "hinge", "ipo")
LOGS = ("tensorboard", "wandb")


@explained()
@dataclass(frozen=True)
class FinetuneOptions:
    """Options that decide what is trained, on what, and how. Raises `OptionError`."""

    method: str = option(
        "lora",
        "train a low-rank adapter, one with lengths of rows, or all weights",
        choices=METHODS,
        group="method",
    )
    rank: int = option(16, "rank of the adapter", 1, 4096)
    alpha: float | None = option(
        None, "strength of the adapter: its scale is alpha / rank; by default the rank", 0.0, 1e6
    )
    dropout: float = option(0.0, "share of an adapter's inputs that a step leaves out", 0.0, 0.99)
    targets: tuple[str, ...] = option(
        TARGETS,
        "the matrices that get an adapter",
        choices=(*TARGETS, EMBEDDINGS),
        commas=True,
        nargs="+",
        metavar="NAME",
    )
    train_on: str | None = option(
        None,
        "tokens that the loss counts: of the answers, of the last one, or all; by default the "
        "answers, and all of plain text",
        choices=("answers", "last", "all"),
        group="data",
    )
    validation: Path | None = option(
        None, "examples that are not trained, on which the model is evaluated", metavar="DATA"
    )
    validation_share: float = option(
        0.05, "without validation: the share of the examples that is kept for it", 0.0, 0.9
    )
    length: int | None = option(
        None, "tokens of a row; by default 1024, or the model's context if less", 8
    )
    overlong: str | None = option(
        None,
        "what happens to an example that is longer than a row; by default text is split, and the "
        "others are refused",
        choices=("split", "refuse"),
    )
    packing: bool = option(True, "put several examples into a row, each by itself")
    batch: int = option(4, "rows that are computed at once", 1, 4096, group="training")
    accumulate: int = option(1, "batches whose gradients make one step", 1, 65536)
    epochs: float = option(3.0, "how often each example is trained", 0.0)
    steps: int | None = option(None, "end after so many steps instead", 1)
    optimizer: str = option("adamw", "one of MLX's", choices=tuple(OPTIMIZERS), group="optimizer")
    learning_rate: float | None = option(
        None, "the largest; by default 3e-4 for an adapter, 2e-5 for all weights", 0.0, 10.0
    )
    schedule: str = option("cosine", "how the learning rate falls", choices=SCHEDULES)
    warmup: float = option(
        0.03, "steps in which it rises, or their share of all if below 1", 0.0, 1e9
    )
    warmup_rate: float = option(0.0, "where it begins to rise", 0.0, 10.0)
    final_rate: float = option(0.0, "where it ends", 0.0, 10.0)
    weight_decay: float = option(0.0, "of the optimizer", 0.0, 10.0)
    beta1: float = option(0.9, "of Adam and Lion, and the momentum of SGD and Muon", 0.0, 0.9999)
    beta2: float = option(0.95, "of Adam and Lion", 0.0, 0.999999)
    epsilon: float = option(1e-8, "of Adam", 0.0, 1.0)
    clip: float = option(1.0, "the largest norm of all gradients together; 0 for no limit", 0.0)
    z_loss: float = option(0.0, "weight of the squared log of the softmax's sum", 0.0, 1.0)
    gradient_checkpointing: bool = option(
        False, "compute each layer again for its gradients, which takes less memory and more time"
    )
    evaluate_every: int | None = option(
        None,
        "steps between evaluations; by default ten of them, and one at the end",
        1,
        group="run",
    )
    patience: int | None = option(None, "stop after so many evaluations without a better one", 1)
    save_every: int = option(50, "steps between checkpoints", 1)
    preference: str | None = option(
        None,
        "the loss on preference pairs (DPO); by default sigmoid",
        choices=PREFERENCES,
        group="preference",
    )
    beta: float = option(0.1, "of DPO: how far the model may go from the one it was", 0.0, 100.0)
    seed: int = option(
        0, "of the first weights, the order and the dropout", 0, 2**32 - 1, group="run"
    )
    log: tuple[str, ...] = option(
        (), "report to these as well", choices=LOGS, commas=True, nargs="+", metavar="NAME"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        for name in OPTIMIZERS["adamw"]:
            if name not in OPTIMIZERS[self.optimizer]:
                check_unset(self, name, f"{self.optimizer} has none")
        if self.schedule == "constant":
            check_unset(self, "final_rate", "a constant learning rate ends where it is")
