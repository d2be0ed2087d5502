"""The architecture of a model: `OpenELMConfig`, and `layer_shapes`, which differ by layer.

OpenELM (arXiv:2404.14619) gives each layer its own number of attention heads and its own size of
the feed-forward network: both grow linearly with depth. Everything that follows from a
configuration is a pure function here, without MLX.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from openelm_mlx.errors import ConfigError
from openelm_mlx.files import read_json
from openelm_mlx.quantization import KEYS

GENERATION_CONFIG = "generation_config.json"
RECORD = "conversion.json"  # what a conversion says of the folder that it wrote
EMBEDDINGS, HEAD = "transformer.token_embeddings", "lm_head"  # stems of tensors
UNK, BOS, EOS = 0, 1, 2  # of LLaMA's tokenizer, which OpenELM uses
Multipliers = tuple[float, ...]


class LayerShape(NamedTuple):
    """One decoder layer: query heads, key/value heads, inner size of the feed-forward network."""

    q_heads: int
    kv_heads: int
    ffn_dim: int


@dataclass(frozen=True)
class OpenELMConfig:
    """The architecture of one model. Raises `ConfigError` for what is not an OpenELM.

    Fields are named as in Apple's config.json on Hugging Face, except `eos_token_ids`: the file's
    `eos_token_id` is a number or a list, and a text ends at any of them. `qkv_multipliers` and
    `ffn_multipliers` are one number for all layers, two for the ends of a ramp, or one per layer.
    `num_query_heads`, `num_kv_heads` and `ffn_dims` replace them if set.
    """

    model_dim: int
    head_dim: int
    num_transformer_layers: int
    vocab_size: int = 32000
    num_gqa_groups: int = 4
    qkv_multipliers: Multipliers = (0.5, 1.0)
    ffn_multipliers: Multipliers = (0.5, 4.0)
    ffn_dim_divisor: int = 256
    num_query_heads: tuple[int, ...] = ()
    num_kv_heads: tuple[int, ...] = ()
    ffn_dims: tuple[int, ...] = ()
    max_context_length: int = 2048
    ffn_with_glu: bool = True
    normalize_qk_projections: bool = True
    share_input_output_layers: bool = True
    rope_freq_constant: float = 10000.0
    rms_norm_eps: float = 1e-6
    bos_token_id: int = BOS
    eos_token_ids: tuple[int, ...] = (EOS,)
    padding_index: int | None = None

    model_type = "openelm"  # a class attribute, not a field: mlx-lm asks for it

    def __post_init__(self) -> None:
        check_types(self)
        sizes = [f.name for f in fields(self) if f.type == "int" and f.name != "bos_token_id"]
        for name in sizes:
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if (layers := self.num_transformer_layers) > MAX_LAYERS:
            most = f"it must be at most {MAX_LAYERS}"
            raise ConfigError(f"num_transformer_layers is {layers}; {most}")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}; rotary embeddings need an even number")
        if self.rms_norm_eps <= 0 or self.rope_freq_constant <= 0:
            raise ConfigError("rms_norm_eps and rope_freq_constant must be above 0")
        for number, shape in enumerate(layer_shapes(self)):
            if min(shape) < 1 or shape.q_heads % shape.kv_heads:
                q, kv, ffn = shape
                what = f"{q} query heads, {kv} key/value heads and FFN size {ffn}"
                rule = "each must be at least 1 and query heads a multiple of key/value heads"
                raise ConfigError(f"layer {number} has {what}; {rule}")

    @property
    def eos_token_id(self) -> int:
        """The first of `eos_token_ids`."""
        return self.eos_token_ids[0]

    @property
    def written_eos(self) -> int | list[int]:
        """`eos_token_ids` as JSON files have them: a number, or a list of several."""
        return list(self.eos_token_ids) if len(self.eos_token_ids) > 1 else self.eos_token_id

    @property
    def overflows_float16(self) -> bool:
        """True if activations leave float16's range (CoreNet, mlx_examples/open_elm/README.md)."""
        return self.model_dim >= 3072

    @property
    def num_parameters(self) -> int:
        """The number of parameters as published: every tensor counts once, also a tied head."""
        return sum(math.prod(shape) for shape in expected_tensors(self).values())

    @property
    def size(self) -> str | None:
        """The published size of this shape, as `PUBLISHED` names it, None for any other shape."""
        shape = {name: getattr(self, name) for name in PUBLISHED["270m"]}
        return next((size for size, other in PUBLISHED.items() if other == shape), None)

    @classmethod
    def from_name(cls, name: str) -> OpenELMConfig:
        """Return a published size: `270m`, `OpenELM-1_1B-Instruct`, ... Raises `ConfigError`."""
        key = normal_name(name)
        if key not in PUBLISHED:
            known = ", ".join(PUBLISHED)
            raise ConfigError(f"{name!r} is not a published OpenELM size; known: {known}")
        return cls(**PUBLISHED[key])

    @classmethod
    def from_hf_dict(cls, raw: Mapping[str, Any]) -> OpenELMConfig:
        """Read the content of a config.json. Raises `ConfigError`, which names the wrong key."""
        if not isinstance(raw, Mapping):
            raise ConfigError(f"config.json must be an object, not {type(raw).__name__}")
        if (kind := raw.get("model_type", "openelm")) != "openelm":
            what = f"config.json has model_type {kind!r}"
            raise ConfigError(f"{what}; this engine runs only 'openelm'")
        known = {f.name for f in fields(cls)} - {"eos_token_ids"} | {"eos_token_id"}
        if unknown := sorted(raw.keys() - known - KEYS_WITHOUT_MEANING - KEYS_THAT_MUST_BE.keys()):
            from difflib import get_close_matches

            near = {key: get_close_matches(key, known, 1) for key in unknown}
            words = [f"{k} (did you mean {v[0]}?)" if v else k for k, v in near.items()]
            raise ConfigError(f"config.json has keys this engine does not know: {', '.join(words)}")
        for key, allowed in KEYS_THAT_MUST_BE.items():
            if key in raw and raw[key] not in allowed:
                computed = f"this engine computes only {allowed[0]!r}"
                raise ConfigError(f"config.json has {key} {raw[key]!r}; {computed}")
        required = [f.name for f in fields(cls) if f.default is MISSING]
        if missing := [name for name in required if raw.get(name) is None]:
            raise ConfigError(f"config.json lacks {', '.join(missing)}")
        values = {key: value for key, value in raw.items() if key in known and value is not None}
        if isinstance(bos := values.get("bos_token_id"), list) and bos:
            values["bos_token_id"] = bos[0]
        if (eos := values.pop("eos_token_id", None)) is not None:
            values["eos_token_ids"] = eos if isinstance(eos, list) else [eos]
        return cls(**{key: normal_value(key, value) for key, value in values.items()})

    @classmethod
    def from_file(cls, path: str | Path) -> OpenELMConfig:
        """Read a config.json. Raises `ConfigError` with the file's name."""
        raw = read_json(Path(path))
        try:
            return cls.from_hf_dict(raw)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None

    def with_eos_of(self, folder: Path) -> OpenELMConfig:
        """Return a copy with the EOS ids of generation_config.json too. Raises `ConfigError`."""
        path = folder / GENERATION_CONFIG
        stated = read_json(path).get("eos_token_id") if path.exists() else None
        ids = stated if isinstance(stated, list) else [] if stated is None else [stated]
        try:
            return replace(self, eos_token_ids=tuple(dict.fromkeys((*self.eos_token_ids, *ids))))
        except (ConfigError, TypeError):
            what = f"eos_token_id is {stated!r}; it must be a whole number or a list of them"
            raise ConfigError(f"{path}: {what}") from None

    def to_hf_dict(self) -> dict[str, Any]:
        """Return the content of config.json for `from_hf_dict`, with per-layer lists for mlx-lm."""
        shapes = layer_shapes(self)
        ffn_dims = [shape.ffn_dim for shape in shapes]
        divisor = self.ffn_dim_divisor
        if any(dim % divisor for dim in ffn_dims):
            divisor = math.gcd(*ffn_dims)
        result = {f.name: getattr(self, f.name) for f in fields(self)}
        result |= {
            "eos_token_id": self.written_eos,
            "model_type": "openelm",
            "architectures": ["OpenELMForCausalLM"],
            "activation_fn_name": "swish",
            "normalization_layer_name": "rms_norm",
            "num_query_heads": [shape.q_heads for shape in shapes],
            "num_kv_heads": [shape.kv_heads for shape in shapes],
            "ffn_multipliers": [dim / self.model_dim for dim in ffn_dims],
            "ffn_dim_divisor": divisor,
            "qkv_multipliers": list(self.qkv_multipliers),
        }
        del result["ffn_dims"], result["eos_token_ids"]
        if self.padding_index is None:
            del result["padding_index"]
        return result


def is_corenet_section(raw: Mapping[str, Any]) -> bool:
    """Return whether a config.json is that of CoreNet's MLX port: the YAML's section, not Hugging
    Face's keys.
    """
    return "model_name" in raw and "model_dim" not in raw


def layer_shapes(c: OpenELMConfig) -> tuple[LayerShape, ...]:
    """Return the shape of each layer; they grow with depth (arXiv:2404.14619, section 2).

    Multipliers are rounded to 2 decimals and computed with Python floats, so every machine rounds
    alike. The 270M, for example, has 12 query heads in 5 layers, 16 in 7 and 20 in 4. Raises
    `ConfigError` for lists of another length than the number of layers.
    """
    n, group = c.num_transformer_layers, c.head_dim * c.num_gqa_groups
    q_dims = [make_divisible(c.model_dim * m, group) for m in ramp(c.qkv_multipliers, n)]
    sizes = [c.model_dim * m for m in ramp(c.ffn_multipliers, n)]
    q_heads = c.num_query_heads or tuple(dim // c.head_dim for dim in q_dims)
    kv_heads = c.num_kv_heads or tuple(q // c.num_gqa_groups for q in q_heads)
    ffn_dims = c.ffn_dims or tuple(make_divisible(size, c.ffn_dim_divisor) for size in sizes)
    columns = {"num_query_heads": q_heads, "num_kv_heads": kv_heads, "ffn_dims": ffn_dims}
    for name, column in columns.items():
        if len(column) != n:
            raise ConfigError(f"{name} has {len(column)} entries for {n} layers")
    return tuple(LayerShape(*row) for row in zip(q_heads, kv_heads, ffn_dims, strict=True))


def expected_tensors(c: OpenELMConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of an unquantized checkpoint, by Hugging Face's names."""
    table = (c.vocab_size, c.model_dim)
    tensors: dict[str, tuple[int, ...]] = {f"{EMBEDDINGS}.weight": table}
    for number, (q_heads, kv_heads, ffn_dim) in enumerate(layer_shapes(c)):
        layer = f"transformer.layers.{number}."
        qkv_dim = (q_heads + 2 * kv_heads) * c.head_dim
        tensors[layer + "attn.qkv_proj.weight"] = (qkv_dim, c.model_dim)
        if c.normalize_qk_projections:
            tensors[layer + "attn.q_norm.weight"] = (c.head_dim,)
            tensors[layer + "attn.k_norm.weight"] = (c.head_dim,)
        tensors[layer + "attn.out_proj.weight"] = (c.model_dim, q_heads * c.head_dim)
        tensors[layer + "ffn.proj_1.weight"] = (ffn_dim * (2 if c.ffn_with_glu else 1), c.model_dim)
        tensors[layer + "ffn.proj_2.weight"] = (c.model_dim, ffn_dim)
        tensors[layer + "ffn_norm.weight"] = (c.model_dim,)
        tensors[layer + "attn_norm.weight"] = (c.model_dim,)
    tensors["transformer.norm.weight"] = (c.model_dim,)
    if not c.share_input_output_layers:
        tensors[f"{HEAD}.weight"] = table
    return tensors


def ramp(multipliers: Multipliers, n: int) -> Multipliers:
    """Return one multiplier a layer: a single one repeated, a pair spread linearly, or as given."""
    if len(multipliers) == 1:
        return multipliers * n
    if len(multipliers) == 2 and n != 2:
        low, high = multipliers
        return tuple(round(low + (high - low) * i / max(n - 1, 1), 2) for i in range(n))
    if len(multipliers) != n:
        raise ConfigError(f"{len(multipliers)} multipliers for {n} layers; give 1, 2 or {n}")
    return multipliers


def make_divisible(value: float, divisor: int) -> int:
    """Return the nearest multiple of `divisor`, at most 10 % below (CoreNet, math_utils.py)."""
    result = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return result + divisor if result < 0.9 * value else result


def normal_name(name: str) -> str:
    """Return the size alone, as `PUBLISHED` spells it: `apple/OpenELM-1_1B-Instruct` -> `1.1b`."""
    size = name.rsplit("/", 1)[-1].lower().replace("_", ".")
    return re.sub(r"-instruct$", "", re.sub(r"^openelm-", "", size))


# arXiv:2404.14619, appendix; corenet/modeling/models/language_modeling
PUBLISHED: dict[str, dict[str, Any]] = {
    "270m": {"num_transformer_layers": 16, "model_dim": 1280, "head_dim": 64},
    "450m": {"num_transformer_layers": 20, "model_dim": 1536, "head_dim": 64},
    "1.1b": {"num_transformer_layers": 28, "model_dim": 2048, "head_dim": 64},
    "3b": {"num_transformer_layers": 36, "model_dim": 3072, "head_dim": 128},
}

# keys of config.json that Apple's class can vary, and the values that this engine computes
KEYS_THAT_MUST_BE: dict[str, tuple[Any, ...]] = {
    "activation_fn_name": ("swish", "silu"),
    "normalization_layer_name": ("rms_norm",),
    "rope_scaling": (None,),
    "add_cross_attention": (False,),
    "pruned_heads": ({}, None),
}

MAX_LAYERS = 4096
MAX_PADDING = 256  # rows without a token; CoreNet pads 32000 tokens to 32128 rows

# what transformers wrote into config.json before version 5, as GenerationConfig has it
GENERATION_KEYS = frozenset(
    {"do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p", "repetition_penalty"}
    | {"max_length", "max_new_tokens", "min_length", "early_stopping", "length_penalty"}
    | {"num_beams", "num_beam_groups", "diversity_penalty", "num_return_sequences"}
    | {"no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "suppress_tokens"}
    | {"begin_suppress_tokens", "forced_bos_token_id", "forced_eos_token_id", "output_scores"}
    | {"exponential_decay_length_penalty", "remove_invalid_values", "return_dict_in_generate"}
)
KEYS_WITHOUT_MEANING = GENERATION_KEYS.union(
    {"model_type", "architectures", "auto_map", "_name_or_path", "transformers_version"}
    | {"dtype", "torch_dtype", *KEYS, "initializer_range"}
    | {"tokenizer_class", "pad_token_id", "tie_word_embeddings", "rope_max_length", "use_cache"}
    | {"return_dict", "output_attentions", "output_hidden_states", "is_encoder_decoder"}
    | {"chunk_size_feed_forward", "id2label", "label2id", "problem_type", "finetuning_task"}
    | {"_attn_implementation_autoset", "_attn_implementation", "attn_implementation", "torchscript"}
    | {"is_decoder", "tie_encoder_decoder", "cross_attention_hidden_size", "decoder_start_token_id"}
    | {"sep_token_id", "prefix", "task_specific_params", "use_bfloat16", "tf_legacy_loss"}
    | {"_commit_hash", "gradient_checkpointing", "num_labels"}
)

TUPLES = {f.name for f in fields(OpenELMConfig) if f.type in ("Multipliers", "tuple[int, ...]")}


def normal_value(key: str, value: Any) -> Any:
    """Return JSON's lists as tuples, and a single multiplier as a tuple."""
    if key not in TUPLES:
        return value
    if isinstance(value, (list, tuple)):
        return tuple(value)
    return (value,) if isinstance(value, (int, float)) and "multipliers" in key else value


def check_types(config: OpenELMConfig) -> None:
    """Raise `ConfigError` for the first value that is not of the type of its field."""
    for item in fields(config):
        value, kind = getattr(config, item.name), str(item.type)
        if value is None and "None" in kind:
            continue
        if item.name in TUPLES:
            integers = "multipliers" not in item.name
            fits = isinstance(value, tuple) and all(is_number(entry, integers) for entry in value)
            what = "a list of whole numbers" if integers else "a list of numbers"
            if item.name == "eos_token_ids":
                fits, what = fits and bool(value), "a whole number or a list of them"
        elif kind == "bool":
            fits, what = isinstance(value, bool), "true or false"
        else:
            integer = kind.startswith("int")
            fits, what = is_number(value, integer), "a whole number" if integer else "a number"
        if not fits:
            raise ConfigError(f"{item.name} is {value!r}; it must be {what}")


def is_number(value: Any, integer: bool) -> bool:
    """Return whether a value is a finite number of a sensible size, or such an integer."""
    if isinstance(value, bool) or not isinstance(value, int if integer else (int, float)):
        return False
    return abs(value) < 2**48  # NaN is not
