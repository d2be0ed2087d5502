"""The first steps of a conversion: what lies in the source, what model it makes, which tokenizer
belongs to it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from openelm_mlx.convert.options import ConvertOptions
from openelm_mlx.convert.sources import (
    OVERRIDES,
    Shapes,
    TensorSource,
    infer_config,
    matrix_shape,
    open_source,
    overrides,
)
from openelm_mlx.convert.sources.adapters import AdaptedCheckpoint, LoraOptions, has_adapters
from openelm_mlx.convert.sources.mlx_adapters import FusedAdapter
from openelm_mlx.convert.sources.yaml_files import read_yaml
from openelm_mlx.convert.tokenizers.tokenizer_model import TokenizerModel, find_tokenizer
from openelm_mlx.device import mx
from openelm_mlx.errors import (
    CheckpointError,
    ConfigError,
    ConversionError,
    OpenELMError,
    OptionError,
    TokenizerError,
)
from openelm_mlx.files import read_json
from openelm_mlx.model.config import PUBLISHED, OpenELMConfig, expected_tensors, normal_name

MAX_PADDING_ROWS = 256  # CoreNet pads 32000 tokens to 32128 rows; a larger gap is another tokenizer
ADAPTER = re.compile(r"\.base_layer\.|lora_|magnitude")


@dataclass(frozen=True)
class OpenedModel:
    """A source whose tensors are known to make the model `config`; `trimmed` lacks the rows that
    pad the vocabulary.
    """

    source: TensorSource
    config: OpenELMConfig
    trimmed: OpenELMConfig
    tokenizer: TokenizerModel

    @property
    def adapters(self) -> AdaptedCheckpoint | None:
        return self.source if isinstance(self.source, AdaptedCheckpoint) else None

    def packed(self, name: str) -> dict[str, mx.array]:
        """The stored arrays of a matrix that is quantized in the source, without the rows that pad
        the vocabulary.
        """
        rows, result = expected_tensors(self.trimmed)[name][0], {}
        for stored, array in self.source.packed(name).items():
            if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
                raise CheckpointError(
                    f"{self.source.path}: {stored} holds NaN or infinite scales; the checkpoint is damaged"
                )
            result[stored] = array[:rows]
        return result


def open_model(options: ConvertOptions) -> OpenedModel:
    """Raises an `OpenELMError` that names the file; reads no weights."""
    try:
        source = with_adapters(open_source(options.source, options.source_format), options)
        check_no_adapter(source.tensors)
        shapes = {name: info.shape for name, info in source.tensors.items()}
        own = source.config
        config = (
            with_flags(own, options)
            if own and not options.config
            else config_for(options.source, shapes, options)
        )
        check_coverage(shapes, expected_tensors(config))
        tokenizer = find_tokenizer(options.source, options.tokenizer, source.tokenizer)
        return OpenedModel(source, config, trim_vocabulary(config, tokenizer), tokenizer)
    except OpenELMError as error:
        files = (options.source, options.config, options.tokenizer, options.adapter_folder)
        if any(str(path) in str(error) for path in files if path is not None):
            raise
        raise type(error)(f"{options.source}: {error}") from None


def with_adapters(source: TensorSource, options: ConvertOptions) -> TensorSource:
    if options.adapter_folder is not None:
        return FusedAdapter(source, options.adapter_folder)
    if has_adapters(source):
        path = config_path(options.source, options)
        yaml = None if path is None or path.suffix == ".json" else path
        lora = LoraOptions(options.lora_alpha, bool(options.rank_stabilised), yaml)
        return AdaptedCheckpoint(source, lora, merge=options.adapter != "keep")
    if (
        options.adapter is not None
        or options.lora_alpha is not None
        or options.rank_stabilised is not None
    ):
        raise OptionError(
            f"{options.source} holds no adapter; leave out --adapter, --lora-alpha and --rank-stabilised"
        )
    return source


def check_no_adapter(names: Iterable[str]) -> None:
    """Raise `ConversionError` for parts of an adapter that `with_adapters` did not understand."""
    for name in names:
        if ADAPTER.search(name):
            raise ConversionError(
                f"the checkpoint holds an adapter ({name}); only whole models are converted: merge it first"
            )


def trim_vocabulary(config: OpenELMConfig, tokenizer: TokenizerModel) -> OpenELMConfig:
    """The configuration without the rows that pad the vocabulary. Raises `TokenizerError` for a
    mismatch.
    """
    pieces = tokenizer.num_pieces
    if not 0 <= config.vocab_size - pieces <= MAX_PADDING_ROWS:
        raise TokenizerError(
            f"{tokenizer.path} has {pieces} pieces, but the model {config.vocab_size} rows of embeddings: "
            "this is another model's tokenizer; give the right one with --tokenizer"
        )
    padding = config.padding_index
    return replace(
        config,
        vocab_size=pieces,
        padding_index=padding if padding is not None and padding < pieces else None,
    )


def check_coverage(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise `CheckpointError` that names the first tensors missing, superfluous or of the wrong
    shape.
    """
    problems = []
    if missing := [name for name in expected if name not in found]:
        problems.append(f"{len(missing)} missing ({', '.join(missing[:3])})")
    if extra := [name for name in found if name not in expected]:
        problems.append(f"{len(extra)} the model does not have ({', '.join(extra[:3])})")
    for name, shape in expected.items():
        if name in found and tuple(found[name]) != tuple(shape):
            problems.append(
                f"{name} has shape {tuple(found[name])} where the configuration asks for {tuple(shape)}"
            )
            break
    if problems:
        raise CheckpointError("the tensors do not make this model: " + "; ".join(problems))


def config_for(source: Path, shapes: Shapes, options: ConvertOptions) -> OpenELMConfig:
    """The source's configuration. Raises `ConfigError`, `CheckpointError` or `ConversionError`."""
    path = config_path(source, options)
    section: dict[str, Any] = {}
    if path is not None:
        raw = read_json(path) if path.suffix == ".json" else {}
        if path.suffix == ".json" and not is_corenet_section(raw):
            return with_flags(OpenELMConfig.from_file(path), options)
        section = {k: v for k, v in raw.items() if k != "quantization"} or corenet_section(path)
        size = normal_name(str(section.get("model_name", "")))
        if (
            size in PUBLISHED
        ):  # an adapted embedding leaves the head behind: what the tensors hold wins
            rows = matrix_shape(shapes, "transformer.token_embeddings.weight")[0]
            held: dict[str, Any] = {"share_input_output_layers": "lm_head.weight" not in shapes}
            held |= {} if "vocab_size" in section else {"vocab_size": rows}
            published = OpenELMConfig(**PUBLISHED[size] | overrides(section) | held)
            return with_flags(published, options)
    return infer_config(shapes, section, options.head_dim, options.rope_base)


def config_path(source: Path, options: ConvertOptions) -> Path | None:
    """`--config`, else config.json of a folder, else config.yaml beside the checkpoint."""
    if options.config is not None or source.is_file():
        return options.config or beside(source, "config.yaml")
    return beside(source, "config.json") or beside(source, "config.yaml")


def is_corenet_section(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is that of CoreNet's MLX port: the YAML's section, not Hugging Face's
    keys.
    """
    return "model_name" in raw and "model_dim" not in raw


def beside(source: Path, name: str) -> Path | None:
    path = (source if source.is_dir() else source.parent) / name
    return path if path.is_file() else None


def with_flags(config: OpenELMConfig, options: ConvertOptions) -> OpenELMConfig:
    if options.head_dim not in (None, config.head_dim):
        raise ConversionError(
            f"--head-dim {options.head_dim} contradicts the configuration, which has {config.head_dim}"
        )
    return (
        config
        if options.rope_base is None
        else replace(config, rope_freq_constant=options.rope_base)
    )


def corenet_section(path: str | Path) -> dict[str, Any]:
    """`model.language_modeling.general_gpt` of a CoreNet YAML. Raises `ConfigError`."""
    node: Any = read_yaml(path)
    for key in ("model", "language_modeling", "general_gpt"):
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise ConfigError(
            f"{path} has no section model.language_modeling.general_gpt: no CoreNet language model"
        )
    known = {"model_name", *OVERRIDES}
    if unknown := sorted(str(key) for key in node.keys() - known):
        raise ConfigError(
            f"{path}: general_gpt has keys this engine does not know: {', '.join(unknown)}"
        )
    return node
