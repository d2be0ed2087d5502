"""Options of a fine-tuning: Python, YAML and the command line build the same object.

    options = FinetuneOptions(rank=8)
    options = FinetuneOptions.of(engine.config, recipe="instruct-dpo", config="mine.yaml", epochs=2)

Of a setting that is given twice, the keyword or flag counts, then the YAML file, then the recipe.
Nothing here needs MLX, so that `openelm --help` can list every option.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from openelm_mlx.errors import OptionError, naming
from openelm_mlx.fields import check_fields, check_unset, explained, nearest, option, shown
from openelm_mlx.files import read_yaml
from openelm_mlx.finetune.recipes import RECIPES, settings_of
from openelm_mlx.model.config import OpenELMConfig

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
ADAPTER_ONLY = ("rank", "alpha", "dropout", "targets")
ROWS, STEPS = 4, 32  # of a batch; of an epoch, at least, unless the batch is given
EITHER = (("epochs", "steps"), ("validation", "validation_share"))  # one replaces the other


@explained()
@dataclass(frozen=True)
class FinetuneOptions:
    """Options that decide what is trained, on what, and how. Raises `OptionError`."""

    method: str = option(
        "lora",
        "train an adapter (dora is lora that also learns the magnitude of each row), or all "
        "weights (full)",
        choices=METHODS,
        group="method",
    )
    recipe: str | None = option(
        None, "start from the settings of a recipe that Apple published", choices=RECIPES
    )
    config: Path | None = option(
        None, "a YAML file of these options, named like the flags but with _ instead of -"
    )
    rank: int = option(16, "rank of the adapter", 1, 4096)  # 8 in PEFT and mlx-lm, CoreNet has 32
    alpha: float | None = option(
        None, "the adapter is scaled by alpha / rank; by default the rank", 0.0, 1e6
    )
    dropout: float = option(0.0, "dropout on the inputs of the adapter", 0.0, 0.99)
    targets: tuple[str, ...] = option(
        TARGETS,
        f"matrices that get an adapter; {EMBEDDINGS} can be added (LoRA on the input side only)",
        choices=(*TARGETS, EMBEDDINGS),
        commas=True,
        nargs="+",
        metavar="NAME",
    )
    train_on: str | None = option(
        None,
        "tokens that count in the loss: those of all answers, of the last one, or all tokens; by "
        "default the answers, and all of plain text",
        choices=("answers", "last", "all"),
        group="data",
    )
    validation: Path | None = option(
        None, "examples for validation, instead of a share of DATA", metavar="DATA"
    )
    validation_share: float = option(
        0.05, "share of the examples that is held out for validation", 0.0, 0.9
    )
    length: int | None = option(
        None,
        "maximum length of a row in tokens; by default 1024, or the model's context if less, or "
        "fewer for a small data set (see --batch)",
        8,
    )
    overlong: str | None = option(
        None,
        "what to do with an example that is longer than a row: split it, refuse the data, or skip "
        "it with a notice; by default plain text is split and all else is refused",
        choices=("split", "refuse", "skip"),
    )
    packing: bool = option(True, "pack several examples into a row; none attends to another")
    batch: int | None = option(
        None,
        f"rows in one pass of the model, or more if rows are shorter; by default {ROWS}, or fewer "
        f"and shorter ones for a small data set, so that an epoch has about {STEPS} steps or more",
        1,
        4096,
        group="training",
    )
    accumulate: int = option(1, "batches whose gradients are accumulated for one step", 1, 65536)
    epochs: float = option(3.0, "passes over the examples", 0.0)
    steps: int | None = option(None, "stop after this many steps, instead of after epochs", 1)
    gradient_checkpointing: bool = option(
        False, "recompute each layer in the backward pass, which saves memory and takes time"
    )
    z_loss: float = option(  # arXiv:2204.02311, section 5; CoreNet has 1e-4
        0.0, "weight of the z-loss, the squared log-sum-exp of the logits", 0.0, 1.0
    )
    optimizer: str = option(
        "adamw", "optimizer, one of MLX's", choices=tuple(OPTIMIZERS), group="optimizer"
    )
    learning_rate: float | None = option(
        None, "peak learning rate; by default 3e-4 for an adapter, 2e-5 for all weights", 0.0, 10.0
    )
    schedule: str = option(
        "cosine", "how the learning rate decays after the warm-up", choices=SCHEDULES
    )
    warmup: float = option(0.03, "warm-up steps; below 1, a share of all steps", 0.0, 1e9)
    warmup_rate: float = option(0.0, "learning rate at the start of the warm-up", 0.0, 10.0)
    final_rate: float = option(0.0, "learning rate at the end of the schedule", 0.0, 10.0)
    weight_decay: float = option(
        0.0,
        "decoupled weight decay, times the learning rate; SGD and Muon add it to the gradients",
        0.0,
        10.0,
    )
    # those of CoreNet, and of most pretraining since GPT-3
    beta1: float = option(0.9, "beta1 of Adam and Lion, momentum of SGD and Muon", 0.0, 0.9999)
    beta2: float = option(0.95, "beta2 of Adam and Lion", 0.0, 0.999999)
    epsilon: float = option(1e-8, "epsilon of Adam", 1e-15, 1.0)
    clip: float = option(
        1.0,
        "largest global norm of the gradients, by default 1; 0 turns clipping off",
        0.0,
    )
    evaluate_every: int | None = option(
        None,
        "steps between evaluations; by default a tenth of all; the last step is always evaluated",
        1,
        group="run",
    )
    patience: int | None = option(
        None, "stop after this many evaluations in a row without a better validation loss", 1
    )
    save_every: int = option(50, "steps between checkpoints", 1)
    preference: str | None = option(
        None,
        "DPO loss on preference pairs; by default sigmoid",
        choices=PREFERENCES,
        group="preference",
    )
    beta: float = option(
        0.1, "beta of DPO: the higher, the closer the model stays to the reference", 1e-6, 100.0
    )
    seed: int = option(
        0,
        "seed of the initial adapter, the order of the examples, and dropout",
        0,
        2**32 - 1,
        group="run",
    )
    log: tuple[str, ...] = option(
        (),
        f"also report to {' or '.join(LOGS)}",
        choices=LOGS,
        commas=True,
        nargs="+",
        metavar="NAME",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        check_applied(self)
        check_trained(self)
        check_length(self)
        check_rates(self)

    @classmethod
    def of(cls, model: OpenELMConfig | None, **settings: Any) -> FinetuneOptions:
        """Return the options for a model of this configuration, with a recipe and a YAML file.

        `settings` are the fields by name, `recipe` and `config` among them. Without a model the
        recipe is that for the smallest: this checks all options before a model is loaded. Raises
        `OptionError`, and `ConfigError` for a file that is no YAML.
        """
        check_names(settings)
        path = read_as(cls, {"config": settings.pop("config", None)})["config"]
        written = {} if path is None else read_settings(cls, path)
        recipe = settings.get("recipe", written.get("recipe"))
        found = {}
        if recipe is not None:
            read_as(cls, {"recipe": recipe})
            found = settings_of(recipe, None if model is None else model.size)
            if model is not None:
                found["length"] = min(found["length"], model.max_context_length)
        for upper in (written, settings):
            gone = {name for group in EITHER if upper.keys() & {*group} for name in group}
            found = {name: value for name, value in found.items() if name not in gone} | upper
        try:
            return cls(**found)
        except OptionError as error:
            if path is None and recipe is None:
                raise
            sources = [*([f"the recipe {recipe}"] if recipe else []), *([path] if path else [])]
            raise OptionError(f"{error} (with {' and '.join(map(str, sources))})") from None

    @property
    def scale(self) -> float:
        """The factor of b a in an adapted matrix: 1 by default, as in CoreNet."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank

    @property
    def largest_rate(self) -> float:
        """The learning rate after the warm-up: by default that of Apple's recipes, of the smallest
        model if all weights are trained.
        """
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-5 if self.method == "full" else 3e-4

    @property
    def rows(self) -> int:
        """The rows in one pass of the model: 4 unless given or, on few data, made fewer."""
        return ROWS if self.batch is None else self.batch

    @property
    def pair_loss(self) -> str:
        """The loss of preference pairs: by default that of the paper on DPO."""
        return self.preference or "sigmoid"

    def settled(self, pairs: bool) -> FinetuneOptions:
        """Return the options with what follows from others, or from preference `pairs`, stated."""
        found: dict[str, Any] = {"learning_rate": self.largest_rate}
        if self.method != "full":
            found["alpha"] = self.scale * self.rank
        if pairs:
            found["preference"] = self.pair_loss
        return replace(self, **found)


def check_applied(options: FinetuneOptions) -> None:
    """Raise `OptionError` for a recipe or a file that only `of` reads."""
    what = "FinetuneOptions.of(engine.config, ...) reads it; give it there"
    check_unset(options, "config", what)
    if options.recipe is not None:
        own = settings_of(options.recipe)
        news = {name: value for name, value in own.items() if value != getattr(type(options), name)}
        if not any(getattr(options, name) == value for name, value in news.items()):
            raise OptionError(f"recipe is {options.recipe}, but {what}")


def check_trained(options: FinetuneOptions) -> None:
    """Raise `OptionError` for an adapter that the method has not, or that is none."""
    if options.method == "full":
        for name in ADAPTER_ONLY:
            check_unset(options, name, "method full has no adapter; give lora or dora, or leave it")
    elif not options.targets:
        raise OptionError(f"targets is empty; allowed: {', '.join((*TARGETS, EMBEDDINGS))}")
    elif options.alpha == 0:
        raise OptionError("alpha is 0.0, and an adapter of no strength learns nothing; raise it")
    elif options.method == "dora" and {*options.targets} == {EMBEDDINGS}:
        raise OptionError(
            f"method is dora, but {EMBEDDINGS} gets LoRA; give another of targets too"
        )


def check_length(options: FinetuneOptions) -> None:
    """Raise `OptionError` for a run without an end or a beginning, or evaluations of nothing."""
    if options.epochs == 0:
        raise OptionError("epochs is 0.0; allowed is a number above 0")
    if options.steps is not None:
        check_unset(options, "epochs", "steps ends the training; give one of them")
    if options.validation is not None:
        check_unset(options, "validation_share", "validation names other examples; give one")
    elif options.validation_share == 0:
        for name in ("evaluate_every", "patience"):
            check_unset(options, name, "validation_share is 0; give it, or validation")


def check_rates(options: FinetuneOptions) -> None:
    """Raise `OptionError` for an optimizer's option that it has not, or rates out of order."""
    for name in OPTIMIZERS["adamw"]:
        if name not in OPTIMIZERS[options.optimizer]:
            check_unset(options, name, f"{options.optimizer} has none")
    if options.schedule == "constant":
        check_unset(options, "final_rate", "a constant learning rate ends where it is")
    if options.warmup == 0:
        check_unset(options, "warmup_rate", "there is no warm-up; give warmup")
    if options.warmup > 1 and not options.warmup.is_integer():
        what = "allowed is a whole number of steps, or a share below 1"
        raise OptionError(f"warmup is {options.warmup}; {what}")
    for name in ("warmup_rate", "final_rate"):
        if getattr(options, name) > options.largest_rate:
            what = f"{name} is {getattr(options, name)}, above the learning rate"
            raise OptionError(f"{what} {options.largest_rate}; give a lower one")


def check_names(names: Iterable[str]) -> None:
    """Raise `OptionError` for the first name that is no option, with the nearest one."""
    known = [item.name for item in fields(FinetuneOptions)]
    for name in names:
        if name not in known:
            near = nearest(str(name), known)
            hint = f"did you mean {near}?" if near else f"known: {', '.join(known)}"
            raise OptionError(f"unknown option {shown(name)}; {hint}")


def read_settings(options: type[FinetuneOptions], path: Path) -> dict[str, Any]:
    """Return the settings in a YAML file, each checked by itself.

    Raises `OptionError`, which names the file, or `ConfigError`.
    """
    raw = read_yaml(path)
    with naming(path):
        if not isinstance(raw, dict):
            raise OptionError("there are no options; write each as in `rank: 8`, in its own line")
        check_names(raw)
        if "config" in raw:
            raise OptionError("config is no option of a file; give its options here")
        return read_as(options, raw)


def read_as(options: type[FinetuneOptions], settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings in the types of their fields, or raise `OptionError` for the first wrong one.

    YAML has numbers without a point, such as 1e-4, as texts.
    """
    probe = object.__new__(options)  # without the checks of options with each other
    for item in fields(options):
        value = settings.get(item.name, item.default)
        if str(item.type).startswith("float") and isinstance(value, str):
            with suppress(ValueError):  # which the check below reports
                value = float(value)
        object.__setattr__(probe, item.name, value)
    check_fields(probe)
    return {name: getattr(probe, name) for name in settings}
