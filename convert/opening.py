"""The first steps of a conversion: what lies in the source, what model it makes, which tokenizer
belongs to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from openelm_mlx.convert.infer import config_for, config_path, with_flags
from openelm_mlx.convert.names import check_coverage, renamed_tensors
from openelm_mlx.convert.options import ConvertOptions
from openelm_mlx.convert.quantize.forms import Form
from openelm_mlx.convert.sources import TensorSource, open_source
from openelm_mlx.convert.sources.adapters import AdaptedCheckpoint, LoraOptions, has_adapters
from openelm_mlx.convert.sources.mlx_adapters import FusedAdapter
from openelm_mlx.convert.targets.folder import find_tokenizer
from openelm_mlx.convert.tokenizers.tokenizer_model import TokenizerModel
from openelm_mlx.device import mx
from openelm_mlx.errors import CheckpointError, OpenELMError, OptionError, TokenizerError
from openelm_mlx.model.config import OpenELMConfig, expected_tensors

MAX_PADDING_ROWS = 256  # CoreNet pads 32000 tokens to 32128 rows; a larger gap is another tokenizer


@dataclass(frozen=True)
class OpenedModel:
    """A source whose tensors are known to make the model `config`; `trimmed` lacks the rows that
    pad the vocabulary.
    """

    source: TensorSource
    names: Mapping[str, str]  # Hugging Face's name -> the source's
    config: OpenELMConfig
    trimmed: OpenELMConfig
    tokenizer: TokenizerModel

    @property
    def adapters(self) -> AdaptedCheckpoint | None:
        return self.source if isinstance(self.source, AdaptedCheckpoint) else None

    @property
    def stored_forms(self) -> dict[str, Form]:
        """Hugging Face's stem -> the form a matrix is quantized in already."""
        stems = {
            name.removesuffix(".weight"): original.removesuffix(".weight")
            for name, original in self.names.items()
        }
        return {
            stem: self.source.forms[original]
            for stem, original in stems.items()
            if original in self.source.forms
        }

    def packed(self, name: str, rows: int) -> dict[str, mx.array]:
        """The stored arrays of a matrix among `stored_forms`, without the rows that pad the
        vocabulary.
        """
        original, result = self.names[name], {}
        for stored, array in self.source.packed(original).items():
            if mx.issubdtype(array.dtype, mx.floating) and not mx.isfinite(array).all().item():
                raise CheckpointError(
                    f"{self.source.path}: {stored} holds NaN or infinite scales; the checkpoint is damaged"
                )
            part = stored.removeprefix(original.removesuffix("weight"))
            result[name.removesuffix("weight") + part] = array[:rows]
        return result


def open_model(options: ConvertOptions) -> OpenedModel:
    """Raises an `OpenELMError` that names the file; reads no weights."""
    try:
        source = with_adapters(open_source(options.source, options.source_format), options)
        names = renamed_tensors(source.tensors)
        shapes = {name: source.tensors[original].shape for name, original in names.items()}
        own = source.config
        config = (
            with_flags(own, options)
            if own and not options.config
            else config_for(options.source, shapes, options)
        )
        check_coverage(shapes, expected_tensors(config))
        tokenizer = find_tokenizer(options, source)
        return OpenedModel(source, names, config, trim_vocabulary(config, tokenizer), tokenizer)
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
