"""Options of sampling and generation, defined once: Python, the command line and benchmarks all build these.

No MLX here, so that `openelm --help` can list every option without loading the engine. `metadata` carries the
help text and the allowed range of each field.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from typing import Any, TypeVar

from openelm_mlx.errors import OptionError

T = TypeVar("T")
KV_BITS = (4, 8)


def check_ranges(options: Any) -> None:
    """Raise `OptionError` for the first field outside the inclusive ``metadata["range"]``; None means "unset"."""
    for item in fields(options):
        value = getattr(options, item.name)
        if value is None or "range" not in item.metadata:
            continue
        low, high = item.metadata["range"]
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not number or not low <= value <= high:
            upper = "" if high == math.inf else f" to {high}"
            raise OptionError(
                f"{item.name} is {value!r}; allowed is a number from {low}{upper}" + (" up" if not upper else "")
            )


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is drawn from the logits; the order of the filters is stated in `sampling.filter_logits`."""

    temperature: float = field(default=0.0, metadata={"help": "0 is greedy", "range": (0.0, 100.0)})
    top_k: int = field(default=0, metadata={"help": "keep the k likeliest tokens; 0 keeps all", "range": (0, math.inf)})
    top_p: float = field(
        default=1.0, metadata={"help": "keep the smallest set of tokens with this mass", "range": (0.0, 1.0)}
    )
    min_p: float = field(
        default=0.0, metadata={"help": "drop tokens below this share of the likeliest one", "range": (0.0, 1.0)}
    )
    repetition_penalty: float = field(
        default=1.0,
        metadata={"help": "divide the score of tokens seen in prompt or answer; 1 is off", "range": (0.01, 100.0)},
    )
    presence_penalty: float = field(
        default=0.0, metadata={"help": "subtracted from the score of tokens already generated", "range": (-100.0, 100.0)}
    )
    frequency_penalty: float = field(
        default=0.0, metadata={"help": "subtracted once for each time a token was generated", "range": (-100.0, 100.0)}
    )
    seed: int | None = field(
        default=None, metadata={"help": "same seed, same tokens; unset draws a new one", "range": (0, 2**63 - 1)}
    )

    def __post_init__(self) -> None:
        check_ranges(self)

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0 or self.top_k == 1

    @property
    def penalised(self) -> bool:
        return self.repetition_penalty != 1.0 or self.presence_penalty != 0.0 or self.frequency_penalty != 0.0


@dataclass(frozen=True)
class GenerationOptions:
    """When generation stops, what is reported with each token, and how the engine runs."""

    max_tokens: int = field(default=256, metadata={"help": "stop after this many tokens", "range": (1, math.inf)})
    stop: tuple[str, ...] = field(
        default=(), metadata={"help": "stop before this text; may be given several times"}
    )
    ignore_eos: bool = field(default=False, metadata={"help": "go on past the end-of-text token"})
    logprobs: int | None = field(
        default=None,
        metadata={"help": "report log probabilities: of the chosen token and of this many likeliest", "range": (0, 100)},
    )
    prefill_chunk: int = field(
        default=512, metadata={"help": "prompt tokens in one pass of the model", "range": (1, math.inf)}
    )
    compiled: bool = field(default=True, metadata={"help": "run the decode step compiled; off is its eager twin"})
    prompt_lookup: int = field(
        default=0,
        metadata={"help": "draft what followed the last time these N tokens were seen; 0 is off", "range": (0, 16)},
    )
    draft_tokens: int = field(
        default=8, metadata={"help": "with a draft model or prompt lookup: draft at most this many", "range": (1, 16)}
    )
    adaptive_draft: bool = field(
        default=True, metadata={"help": "draft less where little is accepted; off always drafts --draft-tokens"}
    )
    kv_bits: int | None = field(
        default=None, metadata={"help": "quantize keys and values of the cache", "choices": KV_BITS}
    )
    kv_window: int | None = field(
        default=None, metadata={"help": "attend to this many tokens only: the first and the latest", "range": (2, math.inf)}
    )
    kv_keep: int = field(default=4, metadata={"help": "with a window: keep this many first tokens", "range": (0, math.inf)})

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.kv_bits not in (None, *KV_BITS):
            raise OptionError(f"kv_bits is {self.kv_bits!r}; allowed: {', '.join(map(str, KV_BITS))}")
        if self.kv_window is not None and self.kv_window <= self.kv_keep:
            raise OptionError(f"kv_window is {self.kv_window} and kv_keep {self.kv_keep}; the window must be the larger one")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        object.__setattr__(self, "stop", tuple(self.stop))
        if any(not isinstance(text, str) or not text for text in self.stop):
            raise OptionError(f"stop is {self.stop!r}; each stop string must be a text of at least one character")


def with_overrides(
    sampling: SamplingOptions | None, options: GenerationOptions | None, overrides: Mapping[str, Any]
) -> tuple[SamplingOptions, GenerationOptions]:
    """Both option objects with the named fields replaced; an unknown name raises `OptionError` with the nearest."""
    sampling, options = sampling or SamplingOptions(), options or GenerationOptions()
    names = {f.name: 0 for f in fields(sampling)} | {f.name: 1 for f in fields(options)}
    for name in overrides:
        if name not in names:
            near = get_close_matches(name, names, 1)
            raise OptionError(
                f"unknown option {name!r}" + (f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}")
            )
    return (
        replace(sampling, **{k: v for k, v in overrides.items() if names[k] == 0}),
        replace(options, **{k: v for k, v in overrides.items() if names[k] == 1}),
    )
