"""Options, defined once: Python, the command line and benchmarks all build these.

Nothing here needs MLX, so that `openelm --help` can list every option without loading the engine.
The metadata of each field has its help text and its allowed range (fields.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, TypedDict

from openelm_mlx.dtypes import FLOATS
from openelm_mlx.errors import OptionError
from openelm_mlx.fields import (
    check_fields,
    check_unset,
    encodable,
    explained,
    nearest,
    option,
    shown,
)
from openelm_mlx.quantization import BITS, GROUP_SIZES, MLX_GROUP_SIZE

KV_BITS = (4, 8)
COARSEST_GREEDY = 1e-6  # below it a temperature leaves float32 logits no choice but the highest


def check_loaded(name: str, engine: Any) -> None:
    """Raise `OptionError` for anything but an `Engine`, above all for the name of a model."""
    if not hasattr(engine, "tokenizer"):
        wanted = f"a loaded model, as in {name} = load('openelm-tiny')"
        raise OptionError(f"{name} is {shown(engine)}; allowed is {wanted}")


@explained()
@dataclass(frozen=True)
class SamplingOptions:
    """Options that decide how the next token is drawn from the logits.

    `sampling.filter_logits` states the order of the filters.
    """

    temperature: float = option(
        0.0, "0 is greedy: top-k, top-p, min-p and XTC then change nothing", 0.0, 100.0
    )
    top_k: int = option(0, "keep the k likeliest tokens; 0 keeps all", 0)
    top_p: float = option(1.0, "keep the smallest set of tokens with this mass", 0.0, 1.0)
    min_p: float = option(0.0, "drop tokens below this share of the likeliest one", 0.0, 1.0)
    xtc_probability: float = option(
        0.0, "exclude top choices this often: all likely tokens but the least likely one", 0.0, 1.0
    )
    xtc_threshold: float = option(
        0.1, "with xtc_probability: how probable a likely token is at least", 0.0, 0.5
    )
    repetition_penalty: float = option(
        1.0, "divide the score of tokens seen in prompt or answer; 1 is off", 0.01, 100.0
    )
    presence_penalty: float = option(
        0.0, "subtracted from the score of tokens already generated", -100.0, 100.0
    )
    frequency_penalty: float = option(
        0.0, "subtracted once for each time a token was generated", -100.0, 100.0
    )
    penalty_window: int = option(
        0, "penalties count only this many latest tokens; 0 counts the entire text", 0, 65536
    )
    logit_bias: tuple[tuple[int, float], ...] = option(
        (), "added to the score of a token id", -100.0, 100.0, metavar="ID=NUMBER"
    )
    processor: Callable[..., Any] | None = option(
        None,
        "f(logits [B, vocab], newest tokens [B], positions drawn [B]) -> logits, row by row; "
        "MLX operations only, as it is compiled with the step",
        flag=None,
    )
    seed: int | None = option(None, "same seed, same tokens; unset draws a new one", 0, 2**63 - 1)
    stream: int = option(
        0,
        "independent noise under the same seed: sample i of n, retry j",
        0,
        2**31 - 1,
        flag="--seed-stream",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.xtc_probability == 0.0:
            check_unset(self, "xtc_threshold", "nothing is excluded; give xtc_probability too")
        if not self.penalised:
            check_unset(self, "penalty_window", "there is no penalty; give one, or leave it out")

    @property
    def greedy(self) -> bool:
        return self.temperature < COARSEST_GREEDY or self.top_k == 1

    @property
    def idle(self) -> list[str]:
        """The filters that were set but change nothing, because the choice is greedy."""
        if not self.greedy or self.top_k == 1:
            return []
        names = ("top_k", "top_p", "min_p", "xtc_probability")
        return [name for name in names if getattr(self, name) != getattr(SamplingOptions, name)]

    @property
    def penalised(self) -> bool:
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)


@explained()
@dataclass(frozen=True)
class GenerationOptions:
    """When an answer ends, what is reported with it, its drafts, its format and its adapter."""

    max_tokens: int = option(256, "stop after this many tokens", 1)
    stop: tuple[str, ...] = option((), "stop before this text")
    stop_tokens: tuple[int, ...] = option(
        (), "stop at this id as at the end of text", 0, 2**31 - 1, flag="--stop-token", metavar="ID"
    )
    ignore_eos: bool = option(False, "go on past the end-of-text token")
    logprobs: int | None = option(
        None, "report log probabilities: of the chosen token and of this many likeliest", 0, 100
    )
    prompt_lookup: int = option(
        0, "draft what followed the last time these N tokens were seen; 0 is off", 0, 16
    )
    draft_tokens: int = option(
        8, "with a draft model or prompt lookup: draft at most this many", 1, 16
    )
    adaptive_draft: bool = option(
        True, "draft less where little is accepted; off always drafts the whole length"
    )
    json_schema: str | None = option(
        None, "answer in JSON of this schema", metavar="FILE", kind="a dict, or JSON as a text"
    )
    regex: str | None = option(None, "answer with a text that matches this expression entirely")
    choices: tuple[str, ...] = option((), "answer with one of these texts", commas=True)
    adapter: str | None = option(
        None, "answer with this adapter of those that the engine has loaded", flag=None
    )

    def __post_init__(self) -> None:
        if isinstance(self.json_schema, Mapping):
            from openelm_mlx.engine.grammar import schema_text

            object.__setattr__(self, "json_schema", schema_text(self.json_schema))
        check_fields(self)
        if self.constrained:
            from openelm_mlx.engine.grammar import format_of

            format_of(self)
        if wrong := next((text for text in self.stop if not encodable(text)), None):
            why = "that is not valid UTF-8, so no generated text contains it"
            raise OptionError(f"stop is {wrong!a}; {why}")

    @property
    def constrained(self) -> bool:
        """True if a schema, an expression or a list of choices restricts the answer."""
        return self.json_schema is not None or self.regex is not None or self.choices != ()

    def check_draft(self, drafts: bool) -> None:
        """Raise `OptionError` if an option about drafts was set and nothing drafts.

        `drafts` says whether there is a draft model; prompt lookup is one of these options.
        """
        if not drafts and not self.prompt_lookup:
            for name in ("draft_tokens", "adaptive_draft"):
                check_unset(self, name, "nothing drafts; give a draft model or prompt_lookup too")


@explained()
@dataclass(frozen=True)
class EngineOptions:
    """Options that decide how requests are run; all that run together share them."""

    prefill_chunk: int | None = option(
        None, "prompt tokens in one pass of the model; by default 512, or what fits into memory", 1
    )
    compiled: bool = option(True, "run the decode step compiled; off runs it eagerly")
    kv_bits: int | None = option(None, "quantize keys and values of the cache", choices=KV_BITS)
    kv_window: int | None = option(
        None, "attend to this many tokens only: the first and the latest", 2
    )
    kv_keep: int = option(4, "with a window: keep this many first tokens", 0)

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kv_window is None:
            check_unset(self, "kv_keep", "there is no window; give kv_window too, or leave it out")
        elif self.kv_window <= self.kv_keep:
            given = f"kv_window is {self.kv_window} and kv_keep {self.kv_keep}"
            raise OptionError(f"{given}; the window must be the larger one")


@explained()
@dataclass(frozen=True)
class ModelOptions:
    """Options that decide how a model is loaded."""

    dtype: str | None = option(None, "compute in this type", choices=FLOATS)
    bits: int | None = option(None, "quantize while loading", choices=BITS)
    group_size: int = option(
        MLX_GROUP_SIZE, "with bits: weights that share a scale", choices=GROUP_SIZES
    )
    tokenizer: Path | None = option(None, "a tokenizer.model from elsewhere")
    revision: str | None = option(None, "branch, tag or commit on the hub", metavar="REV")
    adapter: Path | None = option(
        None, "apply the LoRA or DoRA adapter in this folder, without merging", metavar="FOLDER"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.bits is None:
            check_unset(self, "group_size", "nothing is quantized here; give bits too")


class RequestSettings(TypedDict, total=False):
    """The options of a request as keywords: `**settings: Unpack[RequestSettings]`.

    The keys are the fields of `SamplingOptions` and `GenerationOptions`, which explain them.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    xtc_probability: float
    xtc_threshold: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    penalty_window: int
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]]
    processor: Callable[..., Any] | None
    seed: int | None
    stream: int
    max_tokens: int
    stop: str | Sequence[str]
    stop_tokens: int | Sequence[int]
    ignore_eos: bool
    logprobs: int | None
    prompt_lookup: int
    draft_tokens: int
    adaptive_draft: bool
    json_schema: str | Mapping[str, Any] | None
    regex: str | None
    choices: str | Sequence[str]
    adapter: str | None


class EngineSettings(TypedDict, total=False):
    """The fields of `EngineOptions` as keywords: `**settings: Unpack[EngineSettings]`."""

    prefill_chunk: int | None
    compiled: bool
    kv_bits: int | None
    kv_window: int | None
    kv_keep: int


class Settings(RequestSettings, EngineSettings, total=False):
    """All options as keywords, for functions that run one request or a list of them."""


# the keyword that takes options of a class, and what they belong to
PLACES: dict[type, tuple[str, str]] = {
    SamplingOptions: ("sampling", "a request, not of the engine; give it to submit"),
    GenerationOptions: ("options", "a request, not of the engine; give it to submit"),
    EngineOptions: ("engine_options", "the engine, not of a request; give it to the BatchEngine"),
}
KINDS = tuple(PLACES)  # of all options that a generation takes


def with_overrides(
    kinds: tuple[type, ...], given: tuple[Any, ...], overrides: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Return one object of each of `kinds`: the `given` one, or defaults, with fields replaced.

    Raises `OptionError` for an object of another kind, for a name that belongs to another kind, and
    for an unknown name, with the nearest known one.
    """
    for kind, value in zip(kinds, given, strict=True):
        if value is not None and not isinstance(value, kind):
            name = PLACES[kind][0] if len(kinds) > 1 else "options"
            wanted = f"one made by {kind.__name__}(...), or keywords"
            raise OptionError(f"{name} is {shown(value)}; allowed is {wanted}")
    names = [item.name for kind in kinds for item in fields(kind)]
    for name in overrides:
        for kind, (_, place) in PLACES.items():
            if kind not in kinds and name in (item.name for item in fields(kind)):
                raise OptionError(f"{name} is an option of {place}")
        if name not in names:
            near = nearest(name, names)
            hint = f"did you mean {near!r}?" if near else f"known: {', '.join(names)}"
            raise OptionError(f"unknown option {name!r}; {hint}")
    made = []
    for kind, value in zip(kinds, given, strict=True):
        own = {f.name: overrides[f.name] for f in fields(kind) if f.name in overrides}
        made.append(replace(kind() if value is None else value, **own))
    return tuple(made)


def check_token_ids(sampling: SamplingOptions, options: GenerationOptions, vocab: int) -> None:
    """Raise `OptionError` if an option names a token id that is not below `vocab`."""
    biased = [token for token, _ in sampling.logit_bias]
    for name, ids in (("logit_bias", biased), ("stop_tokens", options.stop_tokens)):
        if wrong := [token for token in ids if token >= vocab]:
            known = f"allowed are ids from 0 to {vocab - 1}"
            raise OptionError(f"{name} has the token id {wrong[0]}; {known}")
