"""Adapters of Hugging Face's PEFT: what adapter_config.json and adapter_model.safetensors say.

PEFT (peft/tuners/lora) stores lora_A [rank, columns] and lora_B [rows, rank] of W [rows, columns],
and lora_magnitude_vector [rows] of DoRA; of the embedding, lora_embedding_A [rank, rows],
lora_embedding_B [columns, rank] and the magnitudes of its columns. Only the input side of a tied
embedding is adapted. Ranks and alphas may differ by layer; the scale of a layer is

    LoRA (arXiv:2106.09685)     alpha / rank
    rsLoRA (arXiv:2312.03732)   alpha / sqrt(rank)

The tensors tell which modules are adapted, so target_modules and the like are not evaluated, and
neither is fan_in_fan_out, which PEFT ignores for the layers of an OpenELM.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openelm_mlx.device import mx
from openelm_mlx.errors import ConfigError, ConversionError
from openelm_mlx.model.adapters import LowRank
from openelm_mlx.model.config import EMBEDDINGS

SETTINGS = "adapter_config.json"  # of mlx-lm's folders too
WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
NAME = re.compile(
    r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B"
    r"|lora_magnitude_vector)(?:\.weight)?"
)
USED = ("r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern")
# keys that are checked by themselves, or change nothing in what a trained adapter computes
OTHERS = {"peft_type", "bias", "init_lora_weights", "task_type", "inference_mode", "peft_version"}
OTHERS |= {"base_model_name_or_path", "revision", "auto_mapping", "runtime_config", "lora_dropout"}
OTHERS |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
OTHERS |= {"fan_in_fan_out", "megatron_core", "loftq_config", "eva_config", "qalora_group_size"}
# initialisations that leave the base as it is; PiSSA, OLoRA, CorDA, LoftQ and LoRA-GA change it
INITS = (None, True, False, "gaussian", "eva", "orthogonal")
MAX_PATTERNS = 4096


@dataclass(frozen=True)
class Settings:
    """The strength of each layer, as adapter_config.json states it."""

    where: str
    rank: int
    alpha: float
    rank_stabilised: bool
    dora: bool
    ranks: Mapping[re.Pattern[str], int]
    alphas: Mapping[re.Pattern[str], float]

    @classmethod
    def of(cls, folder: Path, raw: Mapping[str, Any]) -> Settings:
        """Return the settings of a folder. Raises `ConversionError` for what PEFT does beyond
        LoRA and DoRA, and `ConfigError` for values of the wrong type.
        """
        check_supported(folder, raw)
        where = f"{folder}/{SETTINGS}"
        for key in ("use_rslora", "use_dora"):
            if type(raw.get(key) or False) is not bool:
                raise ConfigError(f"{where}: {key} is {raw[key]!r:.40}; it must be true or false")
        return cls(
            where,
            checked_rank(where, "r", raw.get("r")),
            checked_alpha(where, "lora_alpha", raw.get("lora_alpha")),
            bool(raw.get("use_rslora")),
            bool(raw.get("use_dora")),
            {
                pattern: checked_rank(where, "rank_pattern", value)
                for pattern, value in patterns(where, "rank_pattern", raw).items()
            },
            {
                pattern: checked_alpha(where, "alpha_pattern", value)
                for pattern, value in patterns(where, "alpha_pattern", raw).items()
            },
        )

    def scale(self, stem: str, rank: int) -> float:
        """Return the scale of a layer whose tensors have `rank`. Raises `ConfigError`."""
        stated = next((r for pattern, r in self.ranks.items() if pattern.match(stem)), self.rank)
        if stated != rank:
            raise ConfigError(
                f"{self.where} gives {stem} rank {stated}, but its tensors have rank {rank}"
            )
        alphas = self.alphas.items()
        alpha = next((alpha for pattern, alpha in alphas if pattern.match(stem)), self.alpha)
        return alpha / divisor(rank, self.rank_stabilised)


def divisor(rank: int, rank_stabilised: bool) -> float:
    """Return what alpha is divided by to give the scale of a layer: see above."""
    return math.sqrt(rank) if rank_stabilised else rank


def check_supported(folder: Path, raw: Mapping[str, Any]) -> None:
    """Raise `ConversionError`, by name, for what is not LoRA or DoRA of a plain base."""
    if raw["peft_type"] != "LORA":
        raise ConversionError(
            f"{folder}: peft_type is {raw['peft_type']!r:.40}; of PEFT's adapters LORA is read"
        )
    if raw.get("bias") not in (None, "none"):
        raise ConversionError(
            f"{folder}: bias is {raw['bias']!r:.40}, but OpenELM has no biases; allowed: none"
        )
    init = raw.get("init_lora_weights", True)
    if init not in INITS:
        raise ConversionError(
            f"{folder}: init_lora_weights is {init!r:.40}, which may have changed the base; save "
            "it with path_initial_model_for_weight_conversion, or give one begun with true"
        )
    for key, value in raw.items():
        if value and key not in OTHERS and key not in USED:
            raise ConversionError(
                f"{folder}: {key:.60} is set, which is more than LoRA and DoRA; allowed is an "
                "adapter without it, or the model that PEFT merges it into"
            )


def checked_rank(where: str, key: str, value: Any) -> int:
    if type(value) is not int or not 0 < value < 1 << 20:
        raise ConfigError(f"{where}: {key} has {value!r:.40}; a rank is a whole number above 0")
    return value


def checked_alpha(where: str, key: str, value: Any) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e9:
        raise ConfigError(f"{where}: {key} has {value!r:.40}; an alpha is a number below 1e9")
    return float(value)


def patterns(where: str, key: str, raw: Mapping[str, Any]) -> dict[re.Pattern[str], Any]:
    """Return rank_pattern or alpha_pattern, as PEFT matches them: at the end of a name."""
    found = raw.get(key) or {}
    if not isinstance(found, dict) or len(found) > MAX_PATTERNS:
        raise ConfigError(
            f"{where}: {key} must be an object of at most {MAX_PATTERNS} names and numbers"
        )
    return {plain_pattern(where, key, name): value for name, value in found.items()}


def plain_pattern(where: str, key: str, regex: Any) -> re.Pattern[str]:
    if not is_plain(regex):
        raise ConfigError(
            f"{where}: the regex {str(regex)[:40]!r} of {key} is more than names, '.', '.*' and "
            "'\\d'; write it in these"
        )
    return re.compile(rf"(?:.*\.)?(?:{regex})$")


def is_plain(regex: Any) -> bool:
    """Return whether a pattern is simple enough to be matched; a hostile one could run forever."""
    if not isinstance(regex, str) or len(regex) > 100:
        return False
    simple = re.fullmatch(r"\^?(?:\w|\.\*|\\\.|\\d\+?|\.)*", regex)
    return simple is not None and regex.count("*") + regex.count("+") <= 4


def weights_of(folder: Path) -> Path:
    """Return the file of an adapter's tensors. Raises `ConversionError` for a pickle."""
    if (folder / PICKLE).is_file() and not (folder / WEIGHTS).is_file():
        raise ConversionError(
            f"{folder} contains {PICKLE}, a pickle; load it with PEFT and save it again with "
            "safe_serialization=True"
        )
    return folder / WEIGHTS


def read_parts(
    folder: Path, settings: Settings, arrays: Mapping[str, mx.array]
) -> dict[str, LowRank]:
    """Return the parts of an adapter by stem, from its tensors in float32."""
    found: dict[str, dict[str, mx.array]] = {}
    for name, array in arrays.items():
        match = NAME.fullmatch(name)
        if match is None or match[2] in found.get(match[1], {}):
            raise ConversionError(
                f"{folder} contains {name!r:.100}, which is no part of LoRA or DoRA, or a second "
                "one; save the adapter without modules_to_save and with save_embedding_layers=False"
            )
        found.setdefault(match[1], {})[match[2]] = array
    parts = {}
    for stem, leaves in found.items():
        kind = "lora_embedding_" if stem == EMBEDDINGS else "lora_"
        wanted = [f"{kind}A", f"{kind}B", *(["lora_magnitude_vector"] * settings.dora)]
        check_complete(folder, stem, leaves, wanted)
        a, b, m = leaves[f"{kind}A"], leaves[f"{kind}B"], leaves.get("lora_magnitude_vector")
        scale = settings.scale(stem, a.shape[0])
        if stem == EMBEDDINGS:
            a, b = b.T, a.T
        if m is not None:
            m = m.reshape(1, -1) if stem == EMBEDDINGS else m.reshape(-1)
        parts[stem] = LowRank(a, b, scale, m)
    return parts


def check_complete(
    folder: Path, stem: str, leaves: Mapping[str, mx.array], wanted: Sequence[str]
) -> None:
    """Raise `ConversionError` unless a part has the `wanted` tensors, all of them matrices but for
    a vector of magnitudes.
    """
    if leaves.keys() != set(wanted):
        lacking = sorted(set(wanted) - leaves.keys()) or sorted(leaves.keys() - set(wanted))
        verb = "lacks" if set(wanted) - leaves.keys() else "has, beside LoRA's,"
        raise ConversionError(f"{folder}: the adapter of {stem!r:.100} {verb} {', '.join(lacking)}")
    for leaf, array in leaves.items():
        if leaf in wanted[:2] and (array.ndim != 2 or 0 in array.shape):
            raise ConversionError(
                f"{folder}: {leaf} of {stem!r:.100} has shape {array.shape}; it must be a matrix"
            )


def content(
    parts: Mapping[str, LowRank], base_name: str | None
) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Return the adapter_config.json and the tensors of an adapter."""
    arrays: dict[str, mx.array] = {}
    for stem, part in parts.items():
        if stem == EMBEDDINGS:
            arrays[f"{PREFIX}{stem}.lora_embedding_A"] = part.b.T
            arrays[f"{PREFIX}{stem}.lora_embedding_B"] = part.a.T
        else:
            arrays[f"{PREFIX}{stem}.lora_A.weight"] = part.a
            arrays[f"{PREFIX}{stem}.lora_B.weight"] = part.b
        if part.magnitude is not None:
            arrays[f"{PREFIX}{stem}.lora_magnitude_vector"] = part.magnitude.reshape(-1)
    ranks = {stem: part.rank for stem, part in parts.items()}
    rank_stabilised, alphas = strengths(parts)
    rank, alpha = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, alphas))
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "use_rslora": rank_stabilised,
        "use_dora": any(part.magnitude is not None for part in parts.values()),
        "rank_pattern": {stem: own for stem, own in ranks.items() if own != rank},
        "alpha_pattern": {stem: own for stem, own in alphas.items() if own != alpha},
        "target_modules": list(parts),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
    }
    return settings, arrays


def strengths(parts: Mapping[str, LowRank]) -> tuple[bool, dict[str, float]]:
    """Return whether the scales are alpha / sqrt(rank), and the alpha of each stem.

    They are taken for that only if all alphas are whole numbers then, and are not otherwise.
    """
    found = {}
    for stabilised in (False, True):
        alphas = {}
        for stem, part in parts.items():
            by = divisor(part.rank, stabilised)
            near = part.scale * by
            alphas[stem] = whole if (whole := float(round(near))) / by == part.scale else near
        found[stabilised] = alphas
        if all(alpha.is_integer() for alpha in alphas.values()):
            return stabilised, {stem: int(alpha) for stem, alpha in alphas.items()}
    return False, found[False]
