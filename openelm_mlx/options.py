"""Options, defined once: Python, the command line and benchmarks all build these.

No MLX here, so that `openelm --help` can list every option without loading the engine. `metadata`
carries the help text and the allowed range of each field.
"""

from __future__ import annotations

import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass, replace
from difflib import get_close_matches
from inspect import cleandoc
from pathlib import Path
from typing import Any, TypedDict, TypeVar, overload

from openelm_mlx.errors import OptionError

T = TypeVar("T")
KV_BITS = (4, 8)
DTYPES = ("float32", "bfloat16", "float16")
COARSEST_GREEDY = 1e-6  # below it a temperature leaves float32 logits no choice but the highest
UNFIT = object()
KINDS = {
    "bool": "True or False",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "Path": "a path in UTF-8",
    "tuple[str, ...]": "a text of at least one character, or a list of such texts",
    "tuple[int, ...]": "a whole number, or a list of such numbers",
    "tuple[tuple[int, float], ...]": "a dict of token ids to numbers, or texts ID=NUMBER,",
    "Callable[..., Any]": "a function that can be a key of a dict",
}


def check_fields(options: Any) -> None:
    """Check every field of a dataclass by annotation and metadata, and store it in that type.

    A number that loses nothing by it is converted: of numpy or MLX to Python's, 4.0 to 4 for an
    integer. Raises `OptionError` for the first field of another type, outside the inclusive
    ``metadata["range"]``, or not one of ``metadata["choices"]``. None is allowed where the
    annotation says so.
    """
    for item in fields(options):
        given = getattr(options, item.name)
        value = as_annotated(str(item.type), given)
        if value is UNFIT or not within(item, value):
            raise OptionError(f"{item.name} is {shown(given)}; {allowed(item)}")
        object.__setattr__(options, item.name, value)


def as_annotated(annotation: str, given: Any) -> Any:
    """`given` in the type that `annotation` names; UNFIT where that would lose something."""
    kind, _, rest = annotation.partition(" | ")
    if given is None:
        return None if rest == "None" else UNFIT
    if kind == "Path":
        return (
            Path(os.path.expanduser(given))
            if isinstance(given, (str, os.PathLike)) and fit_path(given)
            else UNFIT
        )
    if kind == "str":
        return str(given) if isinstance(given, str) else UNFIT
    if kind == "Callable[..., Any]":
        return given if callable(given) and hashable(given) else UNFIT
    if kind == "tuple[tuple[int, float], ...]":
        return as_pairs(given)
    if kind.startswith("tuple["):
        parts = given if isinstance(given, (list, tuple)) else (given,)
        found = tuple(as_annotated(kind[len("tuple[") : -len(", ...]")], part) for part in parts)
        return UNFIT if UNFIT in found or "" in found else found
    number = (
        given.item() if getattr(given, "shape", None) == () else given
    )  # the scalars of numpy and MLX
    if kind == "bool" or isinstance(number, bool):
        return number if kind == "bool" and isinstance(number, bool) else UNFIT
    if not isinstance(number, (int, float)):
        return UNFIT
    if kind == "float":
        return float(number) if abs(number) <= sys.float_info.max else UNFIT  # NaN is not, either
    return int(number) if isinstance(number, int) or number.is_integer() else UNFIT


def as_pairs(given: Any) -> Any:
    """Token ids and their numbers, sorted, from a dict, pairs or texts ID=NUMBER; else UNFIT.

    The last of several numbers for one id counts.
    """
    items = [given] if isinstance(given, str) else given
    items = given.items() if isinstance(given, Mapping) else items
    try:
        parts = [item.split("=") if isinstance(item, str) else item for item in items]
        pairs = {
            as_annotated("int", float(token) if isinstance(token, str) else token): as_annotated(
                "float", float(number) if isinstance(number, str) else number
            )
            for token, number in parts
        }
    except (TypeError, ValueError):
        return UNFIT
    if UNFIT in pairs or UNFIT in pairs.values() or min(pairs, default=0) < 0:
        return UNFIT
    return tuple(sorted(pairs.items()))


def hashable(given: Any) -> bool:
    try:
        hash(given)
    except TypeError:
        return False
    return True


def fit_path(given: str | os.PathLike[str]) -> bool:
    """Tell whether MLX can open a file of this name: it takes names in UTF-8 only."""
    name = os.fspath(given)
    return (
        isinstance(name, str)
        and name != ""
        and not any(char == "\0" or "\ud800" <= char <= "\udfff" for char in name)
    )


def within(item: Field[Any], value: Any) -> bool:
    if value is None:
        return True
    if "choices" in item.metadata:
        return value in item.metadata["choices"]
    if "range" not in item.metadata:
        return True
    low, high = item.metadata["range"]
    numbers = value if isinstance(value, tuple) else (value,)
    return all(
        low <= (number[1] if isinstance(number, tuple) else number) <= high for number in numbers
    )


def allowed(item: Field[Any]) -> str:
    """Say what a field may be, as in "allowed is a whole number from 1 to 16, or None"."""
    kind, _, rest = str(item.type).partition(" | ")
    none = ", or None" if rest == "None" else ""
    if "choices" in item.metadata:
        return f"allowed: {', '.join(map(str, item.metadata['choices']))}{none}"
    low, high = item.metadata.get("range", (None, None))
    limits = (
        "" if low is None else f" from {low} up" if high == math.inf else f" from {low} to {high}"
    )
    return f"allowed is {KINDS[kind]}{limits}{none}"


def shown(value: Any) -> str:
    """Quote a value for an error: in one line, and not a long one."""
    text = " ".join(repr(str(value) if isinstance(value, Path) else value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_loaded(name: str, engine: Any) -> None:
    """Raise `OptionError` for anything but an `Engine`, above all for the name of a model."""
    if not hasattr(engine, "tokenizer"):
        raise OptionError(
            f"{name} is {shown(engine)}; allowed is a loaded model, as in {name} = load('openelm-tiny')"
        )


def explained(*options: type) -> Callable[[T], T]:
    """Decorate a function or class so that its docstring ends with all options and their meanings.

    The options are the fields of the classes `options`, or of the decorated dataclass; their texts
    come from the metadata of the fields. `help` and notebooks show them.
    """

    def explain(target: T) -> T:
        classes = options or ((target,) if is_dataclass(target) else ())
        lines = [
            line
            for cls in classes
            for item in fields(cls)
            if "help" in item.metadata
            for line in explanation(item)
        ]
        target.__doc__ = "\n".join([cleandoc(target.__doc__ or ""), "", "Options:", *lines])
        return target

    return explain


def explanation(item: Field[Any]) -> list[str]:
    default = "" if item.default is MISSING else f" = {item.default!r}"
    limits = f"; {allowed(item)}" if item.metadata.keys() & {"range", "choices"} else ""
    text = textwrap.wrap(item.metadata["help"] + limits, 72)
    return [f"    {item.name}: {item.type}{default}", *(f"        {line}" for line in text)]


def option(default: Any, help: str, **metadata: Any) -> Any:
    """A field of a class of options; `check_fields` and the command line read the metadata."""
    return field(default=default, metadata={"help": help, **metadata})


@explained()
@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is drawn from the logits.

    `sampling.filter_logits` states the order of the filters.
    """

    temperature: float = option(
        0.0, "0 is greedy: top-k, top-p, min-p and XTC then change nothing", range=(0.0, 100.0)
    )
    top_k: int = option(0, "keep the k likeliest tokens; 0 keeps all", range=(0, math.inf))
    top_p: float = option(1.0, "keep the smallest set of tokens with this mass", range=(0.0, 1.0))
    min_p: float = option(
        0.0, "drop tokens below this share of the likeliest one", range=(0.0, 1.0)
    )
    xtc_probability: float = option(
        0.0,
        "exclude top choices this often: all likely tokens but the least likely one",
        range=(0.0, 1.0),
    )
    xtc_threshold: float = option(
        0.1, "with xtc_probability: a token is likely from here on", range=(0.0, 0.5)
    )
    repetition_penalty: float = option(
        1.0, "divide the score of tokens seen in prompt or answer; 1 is off", range=(0.01, 100.0)
    )
    presence_penalty: float = option(
        0.0, "subtracted from the score of tokens already generated", range=(-100.0, 100.0)
    )
    frequency_penalty: float = option(
        0.0, "subtracted once for each time a token was generated", range=(-100.0, 100.0)
    )
    penalty_window: int = option(
        0, "penalties look at this many latest tokens only; 0 is the whole text", range=(0, 65536)
    )
    logit_bias: tuple[tuple[int, float], ...] = option(
        (),
        "added to the score of a token id; may be given several times",
        range=(-100.0, 100.0),
        metavar="ID=NUMBER",
    )
    processor: Callable[..., Any] | None = option(
        None,
        "f(logits [B, vocab], newest tokens [B], positions drawn [B]) -> logits, row by row",
        flag=None,
    )
    seed: int | None = option(
        None, "same seed, same tokens; unset draws a new one", range=(0, 2**63 - 1)
    )
    stream: int = option(
        0,
        "independent noise under the same seed: sample i of n, retry j",
        range=(0, 2**31 - 1),
        flag="--seed-stream",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.xtc_probability == 0.0 and self.xtc_threshold != SamplingOptions.xtc_threshold:
            raise OptionError(
                f"xtc_threshold is {self.xtc_threshold}, but nothing is excluded; give xtc_probability too"
            )
        if self.penalty_window and not self.penalised:
            raise OptionError(
                f"penalty_window is {self.penalty_window}, but there is no penalty; give one, or leave it out"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature < COARSEST_GREEDY or self.top_k == 1

    @property
    def idle(self) -> list[str]:
        """Names of the filters that were set but change nothing, because the choice is greedy."""
        names = ("top_k", "top_p", "min_p", "xtc_probability")
        ignored = self.greedy and self.top_k != 1
        return [
            name
            for name in names
            if ignored and getattr(self, name) != getattr(SamplingOptions, name)
        ]

    @property
    def penalised(self) -> bool:
        penalties = (self.repetition_penalty, self.presence_penalty, self.frequency_penalty)
        return penalties != (1.0, 0.0, 0.0)


@explained()
@dataclass(frozen=True)
class GenerationOptions:
    """When a request has ended, what is reported with its tokens, and what is drafted."""

    max_tokens: int = option(256, "stop after this many tokens", range=(1, math.inf))
    stop: tuple[str, ...] = option((), "stop before this text; may be given several times")
    stop_tokens: tuple[int, ...] = option(
        (),
        "stop at this token id, as at the end-of-text token; may be given several times",
        range=(0, 2**31 - 1),
        flag="--stop-token",
        metavar="ID",
    )
    ignore_eos: bool = option(False, "go on past the end-of-text token")
    logprobs: int | None = option(
        None,
        "report log probabilities: of the chosen token and of this many likeliest",
        range=(0, 100),
    )
    prompt_lookup: int = option(
        0, "draft what followed the last time these N tokens were seen; 0 is off", range=(0, 16)
    )
    draft_tokens: int = option(
        8, "with a draft model or prompt lookup: draft at most this many", range=(1, 16)
    )
    adaptive_draft: bool = option(
        True, "draft less where little is accepted; off always drafts the whole length"
    )
    json_schema: str | None = field(
        default=None,
        metadata={"help": "answer in JSON that this schema describes", "metavar": "FILE"},
    )
    regex: str | None = field(
        default=None,
        metadata={"help": "answer with a text that this expression matches as a whole"},
    )
    choices: tuple[str, ...] = field(
        default=(),
        metadata={
            "help": "answer with one of these texts; may be given several times",
            "commas": True,
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.json_schema, Mapping):
            from openelm_mlx.grammar import schema_text

            object.__setattr__(self, "json_schema", schema_text(self.json_schema))
        check_fields(self)
        if self.constrained:
            from openelm_mlx.grammar import form_of

            form_of(self)
        for text in self.stop:
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise OptionError(
                    f"stop is {text!a}; that is not valid UTF-8, so no generated text contains it"
                )

    @property
    def constrained(self) -> bool:
        """Whether the answer has to have a form."""
        return self.json_schema is not None or self.regex is not None or self.choices != ()

    def check_draft(self, drafts: bool) -> None:
        """Raise `OptionError` where the length of drafts was set and nothing drafts.

        `drafts` says whether there is a draft model; these options know of prompt lookup.
        """
        for name in ("draft_tokens", "adaptive_draft"):
            value = getattr(self, name)
            if not drafts and not self.prompt_lookup and value != getattr(GenerationOptions, name):
                raise OptionError(
                    f"{name} is {value}, but nothing drafts; give a draft model or prompt_lookup too"
                )


@explained()
@dataclass(frozen=True)
class EngineOptions:
    """How requests are run: what all that run together share."""

    prefill_chunk: int = option(512, "prompt tokens in one pass of the model", range=(1, math.inf))
    compiled: bool = option(True, "run the decode step compiled; off is its eager twin")
    kv_bits: int | None = option(None, "quantize keys and values of the cache", choices=KV_BITS)
    kv_window: int | None = option(
        None, "attend to this many tokens only: the first and the latest", range=(2, math.inf)
    )
    kv_keep: int = option(4, "with a window: keep this many first tokens", range=(0, math.inf))

    def __post_init__(self) -> None:
        check_fields(self)
        if self.kv_window is None and self.kv_keep != EngineOptions.kv_keep:
            raise OptionError(
                f"kv_keep is {self.kv_keep}, but there is no window; give kv_window too, or leave it out"
            )
        if self.kv_window is not None and self.kv_window <= self.kv_keep:
            raise OptionError(
                f"kv_window is {self.kv_window} and kv_keep {self.kv_keep}; the window must be the larger one"
            )


@explained()
@dataclass(frozen=True)
class ModelOptions:
    """How a model is loaded."""

    dtype: str | None = option(None, "compute in this type", choices=DTYPES)
    bits: int | None = option(None, "quantize while loading", choices=(2, 3, 4, 5, 6, 8))
    group_size: int = option(64, "with bits: weights that share a scale", choices=(32, 64, 128))
    tokenizer: Path | None = option(None, "a tokenizer.model from elsewhere")
    revision: str | None = option(None, "branch, tag or commit on the hub", metavar="REV")

    def __post_init__(self) -> None:
        check_fields(self)
        if self.bits is None and self.group_size != ModelOptions.group_size:
            raise OptionError(
                f"group_size is {self.group_size}, but nothing is quantized here; give bits too"
            )


def nearest(word: str, known: Iterable[str]) -> str | None:
    """The known word that `word` was meant to be: the only one it begins, else the most similar."""
    known = list(known)
    begun = [name for name in known if name.startswith(word)]
    near = begun if len(begun) == 1 else get_close_matches(word, known, 1)
    return near[0] if near else None


class RequestSettings(TypedDict, total=False):
    """The options of a request as keywords: `**settings: Unpack[RequestSettings]`.

    The keys are the fields of `SamplingOptions` and `GenerationOptions`, with the same texts. Those
    classes hold the defaults.
    """

    temperature: float
    """0 is greedy: top-k, top-p, min-p and XTC then change nothing"""
    top_k: int
    """keep the k likeliest tokens; 0 keeps all"""
    top_p: float
    """keep the smallest set of tokens with this mass"""
    min_p: float
    """drop tokens below this share of the likeliest one"""
    xtc_probability: float
    """exclude top choices this often: all likely tokens but the least likely one"""
    xtc_threshold: float
    """with xtc_probability: a token is likely from here on"""
    repetition_penalty: float
    """divide the score of tokens seen in prompt or answer; 1 is off"""
    presence_penalty: float
    """subtracted from the score of tokens already generated"""
    frequency_penalty: float
    """subtracted once for each time a token was generated"""
    penalty_window: int
    """penalties look at this many latest tokens only; 0 is the whole text"""
    logit_bias: Mapping[int, float] | Sequence[tuple[int, float]]
    """added to the score of a token id; may be given several times"""
    processor: Callable[..., Any] | None
    """f(logits [B, vocab], newest tokens [B], positions drawn [B]) -> logits, row by row"""
    seed: int | None
    """same seed, same tokens; unset draws a new one"""
    stream: int
    """independent noise under the same seed: sample i of n, retry j"""
    max_tokens: int
    """stop after this many tokens"""
    stop: str | Sequence[str]
    """stop before this text; may be given several times"""
    stop_tokens: int | Sequence[int]
    """stop at this token id, as at the end-of-text token; may be given several times"""
    ignore_eos: bool
    """go on past the end-of-text token"""
    logprobs: int | None
    """report log probabilities: of the chosen token and of this many likeliest"""
    prompt_lookup: int
    """draft what followed the last time these N tokens were seen; 0 is off"""
    draft_tokens: int
    """with a draft model or prompt lookup: draft at most this many"""
    adaptive_draft: bool
    """draft less where little is accepted; off always drafts the whole length"""
    json_schema: str | Mapping[str, Any] | None
    """answer in JSON that this schema describes"""
    regex: str | None
    """answer with a text that this expression matches as a whole"""
    choices: str | Sequence[str]
    """answer with one of these texts; may be given several times"""


class EngineSettings(TypedDict, total=False):
    """The fields of `EngineOptions` as keywords, likewise."""

    prefill_chunk: int
    """prompt tokens in one pass of the model"""
    compiled: bool
    """run the decode step compiled; off is its eager twin"""
    kv_bits: int | None
    """quantize keys and values of the cache"""
    kv_window: int | None
    """attend to this many tokens only: the first and the latest"""
    kv_keep: int
    """with a window: keep this many first tokens"""


class Settings(RequestSettings, EngineSettings, total=False):
    """Every option as a keyword, for what runs a single request or a list of them."""


# the keyword that takes such options, and whose options they are
PLACES: dict[type, tuple[str, str]] = {
    SamplingOptions: ("sampling", "a request, not of the engine; give it to submit"),
    GenerationOptions: ("options", "a request, not of the engine; give it to submit"),
    EngineOptions: ("engine_options", "the engine, not of a request; give it to the BatchEngine"),
}
A = TypeVar("A")
B = TypeVar("B")
C = TypeVar("C")


@overload
def with_overrides(
    kinds: tuple[type[A]], given: tuple[A | None], overrides: Mapping[str, Any]
) -> tuple[A]: ...
@overload
def with_overrides(
    kinds: tuple[type[A], type[B]], given: tuple[A | None, B | None], overrides: Mapping[str, Any]
) -> tuple[A, B]: ...
@overload
def with_overrides(
    kinds: tuple[type[A], type[B], type[C]],
    given: tuple[A | None, B | None, C | None],
    overrides: Mapping[str, Any],
) -> tuple[A, B, C]: ...
def with_overrides(
    kinds: tuple[Any, ...], given: tuple[Any, ...], overrides: Mapping[str, Any]
) -> tuple[Any, ...]:
    """Return one object of each of `kinds`: the `given` one, or defaults, with fields replaced.

    Raises `OptionError` for an object of another kind, for a name that belongs to another kind, and
    for an unknown one, with the nearest name that is known.
    """
    for kind, value in zip(kinds, given, strict=True):
        if value is not None and not isinstance(value, kind):
            name = PLACES[kind][0] if len(kinds) > 1 else "options"
            made = f"made by {kind.__name__}(...), or keywords"
            raise OptionError(f"{name} is {shown(value)}; allowed is one {made}")
    names = [item.name for kind in kinds for item in fields(kind)]
    for name in overrides:
        for kind, (_, place) in PLACES.items():
            if kind not in kinds and name in (item.name for item in fields(kind)):
                raise OptionError(f"{name} is an option of {place}")
        if name not in names:
            near = nearest(name, names)
            hint = f"did you mean {near!r}?" if near else f"known: {', '.join(names)}"
            raise OptionError(f"unknown option {name!r}; {hint}")
    return tuple(
        replace(
            kind() if value is None else value,
            **{f.name: overrides[f.name] for f in fields(kind) if f.name in overrides},
        )
        for kind, value in zip(kinds, given, strict=True)
    )


def check_token_ids(sampling: SamplingOptions, options: GenerationOptions, vocab: int) -> None:
    """Raise `OptionError` where an option names a token that is not one of `vocab`."""
    for name, ids in (
        ("logit_bias", dict(sampling.logit_bias)),
        ("stop_tokens", options.stop_tokens),
    ):
        if wrong := [token for token in ids if token >= vocab]:
            raise OptionError(
                f"{name} has the token id {wrong[0]}; allowed are ids from 0 to {vocab - 1}"
            )
