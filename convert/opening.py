"""The first steps of a conversion: open the source, find the configuration that its tensors make,
and its tokenizer.

Opening reads no weights. `OpenedModel` reads them afterwards, and refuses NaN and infinities.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from openelm_mlx.convert.options import ConvertOptions
from openelm_mlx.convert.sources import (
    OVERRIDES,
    TensorSource,
    infer_config,
    kind_of,
    matrix_shape,
    overrides,
    weights_by_kind,
)
from openelm_mlx.convert.sources.adapters import AdaptedSource, is_adapter, with_adapter
from openelm_mlx.convert.sources.corenet_adapters import (
    BaseLayers,
    LoraOptions,
    corenet_adapter,
    has_adapters,
)
from openelm_mlx.convert.sources.folder import HuggingFaceFolder
from openelm_mlx.convert.sources.gguf import GGUFFile
from openelm_mlx.convert.sources.torch_pt import TorchCheckpoint
from openelm_mlx.convert.tokenizers import TokenizerModel, find_tokenizer
from openelm_mlx.device import mx
from openelm_mlx.engine.tokenizer import check_vocabulary
from openelm_mlx.errors import (
    ConfigError,
    ConversionError,
    naming,
)
from openelm_mlx.files import read_json, read_yaml
from openelm_mlx.model.checkpoint import (
    Shapes,
    check_finite,
    check_frequencies,
    check_tensors,
    equal_bits,
    states_own_head,
    with_head_of,
)
from openelm_mlx.model.config import (
    EMBEDDINGS,
    HEAD,
    PUBLISHED,
    OpenELMConfig,
    expected_tensors,
    is_corenet_section,
    normal_name,
)
from openelm_mlx.model.names import ADAPTER
from openelm_mlx.quantization import KEYS

WANTED = "a CoreNet .pt file, a folder of safetensors or a GGUF file"
FILE_KIND = {  # what --from says -> what the files are
    "pt": "pt",
    "huggingface": "safetensors",
    "mlx": "safetensors",
    "corenet-mlx": "safetensors",
    "gguf": "gguf",
}
HEAD_ROWS = 2048  # of a head and of the embeddings that are compared at a time


@dataclass(frozen=True)
class OpenedModel:
    """A source whose tensors are known to make the model `config`; `trimmed` lacks the rows that
    pad the vocabulary.
    """

    source: TensorSource
    config: OpenELMConfig
    trimmed: OpenELMConfig
    tokenizer: TokenizerModel
    quantized: Mapping[str, str] = field(default_factory=dict)
    """The quantization of the source's matrices, by stem, also of those that an adapter is merged
    into."""

    @property
    def adapted(self) -> AdaptedSource | None:
        return self.source if isinstance(self.source, AdaptedSource) else None

    @cached_property
    def shapes(self) -> Shapes:
        """The shapes of the model's tensors without the rows that pad the vocabulary, in order."""
        return expected_tensors(self.trimmed)

    def load(self, name: str) -> mx.array:
        """Return the tensor `name` without the rows that pad the vocabulary.

        This and the next two raise `CheckpointError` for NaN and infinities.
        """
        return self._finite(name, self.source.load(name)[: self.shapes[name][0]])

    def pieces(self, name: str, step: int) -> Iterator[mx.array]:
        """Yield the rows of the tensor `name`, at most `step` at a time."""
        rows, read = self.shapes[name][0], self.source.reader(name)
        for start in range(0, rows, step):
            yield self._finite(name, read(start, min(start + step, rows)))

    def packed(self, name: str) -> dict[str, mx.array]:
        """Return the stored arrays of a matrix of the source's plan, without the rows that pad the
        vocabulary.
        """
        parts, rows = self.source.packed(name), self.shapes[name][0]
        return {part: self._finite(part, array)[:rows] for part, array in parts.items()}

    def _finite(self, name: str, array: mx.array) -> mx.array:
        with naming(self.source.path):
            check_finite({name: array}, self.source.plan)
        return array


def open_model(options: ConvertOptions) -> OpenedModel:
    """Open the source, and find its configuration and tokenizer.

    Raises an `OpenELMError` that names the file.
    """
    with naming(options.source, options.config, options.tokenizer, options.adapter_folder):
        if is_adapter(options.source):
            raise ConversionError(
                f"{options.source} is an adapter, not a model; give its base, and the adapter as "
                "--adapter, or to openelm convert as --adapter-folder"
            )
        source, adapter = open_source(options.source, options.source_format), None
        drop_copied_head(source, options)
        quantized, rotary = source.quantized, source.rotary
        if has_adapters(source):
            adapter, source = corenet_adapter(source, lora_options(options)), BaseLayers(source)
        check_no_adapter(source.tensors)
        shapes = {name: info.shape for name, info in source.tensors.items()}
        if source.config and not options.config:
            config = with_flags(source.config, options)
        else:
            config = config_for(options.source, shapes, options)
        config = with_head_of(config, shapes)
        check_tensors(source.tensors, expected_tensors(config))
        if rotary is not None:
            check_frequencies(config, *rotary)
        source = with_adapter(source, config, adapter, options)
        if isinstance(source, AdaptedSource):
            config = source.adapted_config
        tokenizer = find_tokenizer(options.source, options.tokenizer, source.tokenizer)
        trimmed = trim_vocabulary(config, tokenizer)
        return OpenedModel(source, config, trimmed, tokenizer, quantized)


def drop_copied_head(source: TensorSource, options: ConvertOptions) -> None:
    """Remove a head that repeats the embeddings, unless the configuration says that they differ.

    It reads both, some rows at a time, up to the first difference.
    """
    head, embeddings = f"{HEAD}.weight", f"{EMBEDDINGS}.weight"
    if source.tensors.get(head, 0) != source.tensors.get(embeddings, 1):
        return
    path = config_path(options.source, options)
    if path is not None and path.suffix == ".json" and states_own_head(read_json(path)):
        return
    rows, readers = source.tensors[head].shape[0], (source.reader(head), source.reader(embeddings))
    for start in range(0, rows, HEAD_ROWS):
        one, other = (read(start, min(start + HEAD_ROWS, rows)) for read in readers)
        if not equal_bits(one, other):
            return
    del source.tensors[head]
    source.plan = {stem: spec for stem, spec in source.plan.items() if stem != HEAD}
    source.quantized = {stem: kind for stem, kind in source.quantized.items() if stem != HEAD}
    if source.config is not None:
        source.config = replace(source.config, share_input_output_layers=True)


def open_source(path: Path, source_format: str | None = None) -> TensorSource:
    """Return the reader for `path`, by its content and not its name.

    `source_format` (`--from`) forces one of `FILE_KIND`. Raises `ConversionError`.
    """
    if not os.path.exists(path):
        raise ConversionError(f"{path} does not exist; give {WANTED}")
    if path.is_dir():
        return open_folder(path, source_format)
    if not os.path.isfile(path):  # a pipe would be waited for without end
        raise ConversionError(f"{path} is neither a file nor a folder; give {WANTED}")
    found = kind_of(path)
    if found == "safetensors" and source_format is None:
        raise ConversionError(
            f"{path} is one file of a model; give its folder, which also contains config.json"
        )
    kind = found if source_format is None else FILE_KIND[source_format]
    if kind == "safetensors":
        raise ConversionError(
            f"{path} is not a folder; --from {source_format} takes the folder of a model"
        )
    if kind is None and path.stat().st_size == 0:
        raise ConversionError(f"{path} is empty; fetch or copy it again")
    return open_file(path, kind)


def open_folder(path: Path, source_format: str | None) -> TensorSource:
    found = weights_by_kind(path)
    problem = f"{path} contains neither safetensors nor a .pt or GGUF file; give {WANTED}"
    if source_format is not None:
        found = {kind: of for kind, of in found.items() if kind == FILE_KIND[source_format]}
        problem = f"{path} contains nothing that --from {source_format} reads; give {WANTED}"
    kind = next(iter(found), None)
    if kind is None:
        raise ConversionError(problem)
    if kind == "safetensors":
        return HuggingFaceFolder(path)
    if (path / "pytorch_model.bin.index.json").is_file():
        remedy = "save them as safetensors, with save_pretrained of transformers"
        raise ConversionError(f"{path} has its weights in parts of torch's format; {remedy}")
    if len(found) > 1:  # not the same weights: a GGUF file is often quantized
        names = " and ".join(of[0].name for of in found.values())
        raise ConversionError(f"{path} contains {names}, two models; name one of them")
    if len(found[kind]) > 1:
        raise ConversionError(f"{path} contains {len(found[kind])} {kind} files; name one of them")
    return open_file(found[kind][0], kind)


def open_file(path: Path, kind: str | None) -> TensorSource:
    if kind == "gguf" or (kind is None and path.suffix.lower() == ".gguf"):
        return GGUFFile(path)
    return TorchCheckpoint(path)


def lora_options(options: ConvertOptions) -> LoraOptions:
    path = config_path(options.source, options)
    yaml = None if path is None or path.suffix == ".json" else path
    return LoraOptions(options.lora_alpha, bool(options.rank_stabilised), yaml)


def check_no_adapter(names: Iterable[str]) -> None:
    """Raise `ConversionError` for parts of an adapter that nothing here understands."""
    for name in names:
        if ADAPTER.search(name):
            raise ConversionError(
                f"the checkpoint contains an adapter ({name}); only complete models are converted: "
                "merge it first"
            )


def trim_vocabulary(config: OpenELMConfig, tokenizer: TokenizerModel) -> OpenELMConfig:
    """Return the configuration without the rows that pad the vocabulary.

    Raises `TokenizerError` if the tokenizer belongs to another model.
    """
    pieces = tokenizer.num_pieces
    check_vocabulary(tokenizer.path, pieces, config)
    padding = config.padding_index
    if padding is not None and padding >= pieces:
        padding = None
    return replace(config, vocab_size=pieces, padding_index=padding)


def config_for(source: Path, shapes: Shapes, options: ConvertOptions) -> OpenELMConfig:
    """Return the configuration in the source's file, or else the one that its shapes make.

    Raises `ConfigError`, `CheckpointError` or `ConversionError`.
    """
    path = config_path(source, options)
    section: dict[str, Any] = {}
    if path is not None:
        raw = read_json(path) if path.suffix == ".json" else {}
        if path.suffix == ".json" and not is_corenet_section(raw):
            return with_flags(OpenELMConfig.from_file(path), options)
        section = {k: v for k, v in raw.items() if k not in KEYS} or corenet_section(path)
        size = normal_name(str(section.get("model_name", "")))
        if size in PUBLISHED:
            # an adapted embedding leaves the head behind: what the tensors contain wins
            known: dict[str, Any] = {"share_input_output_layers": f"{HEAD}.weight" not in shapes}
            if "vocab_size" not in section:
                known["vocab_size"] = matrix_shape(shapes, f"{EMBEDDINGS}.weight")[0]
            published = OpenELMConfig(**PUBLISHED[size] | overrides(section) | known)
            return with_flags(published, options)
    return infer_config(shapes, section, options.head_dim, options.rope_base)


def config_path(source: Path, options: ConvertOptions) -> Path | None:
    """Return `--config`, else config.json of a folder, else config.yaml beside the checkpoint."""
    if options.config is not None or source.is_file():
        return options.config or beside(source, "config.yaml")
    return beside(source, "config.json") or beside(source, "config.yaml")


def beside(source: Path, name: str) -> Path | None:
    path = (source if source.is_dir() else source.parent) / name
    return path if path.is_file() else None


def corenet_section(path: str | Path) -> dict[str, Any]:
    """Return `model.language_modeling.general_gpt` of a CoreNet YAML. Raises `ConfigError`."""
    node: Any = read_yaml(path)
    for key in ("model", "language_modeling", "general_gpt"):
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        raise ConfigError(
            f"{path} has no section model.language_modeling.general_gpt: it is not a CoreNet "
            "language model"
        )
    if unknown := sorted(str(key) for key in node.keys() - {"model_name", *OVERRIDES}):
        raise ConfigError(
            f"{path}: general_gpt has keys this engine does not know: {', '.join(unknown)}"
        )
    return node


def with_flags(config: OpenELMConfig, options: ConvertOptions) -> OpenELMConfig:
    if options.head_dim not in (None, config.head_dim):
        raise ConversionError(
            f"--head-dim {options.head_dim} contradicts the configuration, which has "
            f"{config.head_dim}"
        )
    base = options.rope_base
    return config if base is None else replace(config, rope_freq_constant=base)
