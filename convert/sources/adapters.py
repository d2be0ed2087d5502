"""A source with an adapter: merged into its weights, or kept apart to be written beside them.

A form of adapter that cannot say whether it adapts one side of a tied embedding or both, needs a
base with a head of its own: the embedding then lies there twice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from openelm_mlx.convert.options import ConvertOptions
from openelm_mlx.convert.sources import TensorSource
from openelm_mlx.device import mx
from openelm_mlx.engine.adapter_files import (
    WEIGHT_FILES,
    check_embedding,
    read_adapter,
    with_rows,
    write_adapter,
)
from openelm_mlx.errors import ConversionError, OptionError, naming
from openelm_mlx.model.adapters import Adapter, LowRank, lengths
from openelm_mlx.model.checkpoint import check_finite
from openelm_mlx.model.config import EMBEDDINGS, HEAD, OpenELMConfig
from openelm_mlx.model.fingerprint import SAMPLE, fingerprint, same_base
from openelm_mlx.model.peft import SETTINGS
from openelm_mlx.quantization import stem_of

ADAPTER_FOLDER, CONFIG = "adapter", "config.json"
FORM_OF = {"mlx": "mlx-lm", "hf": "peft"}  # target -> the form of an adapter for it


def is_adapter(source: Path) -> bool:
    """Return whether this is the folder of an adapter and of nothing else."""
    return (source / SETTINGS).is_file() and not (source / CONFIG).is_file()


class AdaptedSource(TensorSource):
    """A source of a model of `config` with an adapter.

    `form` is the one in which the adapter is kept, None to merge it. Raises `ConversionError` if
    the adapter was made for another model.
    """

    def __init__(
        self,
        source: TensorSource,
        config: OpenELMConfig,
        adapter: Adapter,
        files: tuple[Path, ...] = (),
        form: str | None = None,
    ) -> None:
        self.path, self.tokenizer = source.path, source.tokenizer
        self.instruct = source.instruct or (form is None and adapter.instruct)
        self.licence, self.form = source.licence, form
        self._source, self._files = source, files
        self._base_config = config
        # without need it is not taken: rows of a .pt cost the checksum of all of it
        if adapter.base is not None and not same_base(adapter.base, self.fingerprint()):
            raise ConversionError(
                f"the adapter {adapter.name} was made for another model than {source.path}: the "
                "weights differ; give its own base"
            )
        self.adapter = adapter
        self.tensors = dict(source.tensors)
        parts = {} if form else adapter.parts
        self.plan = {stem: spec for stem, spec in source.plan.items() if stem not in parts}
        self.adapted_config = config
        if config.share_input_output_layers and not keeps_tie(adapter, form):
            self.adapted_config = replace(config, share_input_output_layers=False)
            self.tensors[f"{HEAD}.weight"] = self.tensors[f"{EMBEDDINGS}.weight"]
            if EMBEDDINGS in source.plan and HEAD not in parts:
                self.plan[HEAD] = source.plan[EMBEDDINGS]

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self._source.files, *self._files)

    def fingerprint(self) -> str:
        """Return the fingerprint of the base."""
        return fingerprint(self._base_config, self._rows)

    def _rows(self, name: str) -> mx.array | None:
        quantized = stem_of(name) in self._source.quantized
        return None if quantized else self._source.reader(name)(0, SAMPLE)

    def _stored(self, name: str) -> str:
        return name if name in self._source.tensors else f"{EMBEDDINGS}.weight"

    def _part(self, name: str) -> LowRank | None:
        return None if self.form else self.adapter.parts.get(stem_of(name))

    def base_weight(self, stem: str) -> mx.array:
        return self._source.load(self._stored(f"{stem}.weight"))

    def load(self, name: str) -> mx.array:
        """Return the tensor `name`, merged in float32 and rounded once to the type of its base."""
        base, part = self._source.load(self._stored(name)), self._part(name)
        if part is None:
            return base
        merged = part.merged(base).astype(base.dtype)
        with naming(f"{self.path} with the adapter {self.adapter.name}"):
            check_finite({name: merged}, {})
        return merged

    def reader(self, name: str) -> Callable[[int, int], mx.array]:
        if self._part(name) is None:
            return self._source.reader(self._stored(name))
        return super().reader(name)

    def packed(self, name: str) -> dict[str, mx.array]:
        stored = self._stored(name)
        arrays = self._source.packed(stored)
        stems = stem_of(stored), stem_of(name)
        return {key.replace(*stems): array for key, array in arrays.items()}


def keeps_tie(adapter: Adapter, form: str | None) -> bool:
    """Return whether a tied model stays so with an adapter that is kept in `form`, or merged."""
    first, head = adapter.parts.get(EMBEDDINGS), adapter.parts.get(HEAD)
    return head is None if form == "peft" else first is head


def with_adapter(
    source: TensorSource, config: OpenELMConfig, adapter: Adapter | None, options: ConvertOptions
) -> TensorSource:
    """Return the source with its own `adapter`, or the one that the options name.

    Raises `OptionError` for options of an adapter without one, and what `read_adapter` raises.
    """
    folder = options.adapter_folder
    files: tuple[Path, ...] = ()
    if folder is not None:
        if adapter is not None:
            raise ConversionError(
                f"{source.path} contains an adapter already; leave out --adapter-folder, or give a "
                "base without one"
            )
        adapter = read_adapter(folder, config)
        files = tuple(path for name in WEIGHT_FILES if (path := folder / name).is_file())
    strength = (options.lora_alpha, options.rank_stabilised)
    unused = strength if adapter is not None else (*strength, options.adapter)
    if (adapter is None or folder is not None) and any(flag is not None for flag in unused):
        reason = f"{options.source} contains no adapter; leave out --adapter, --lora-alpha"
        if folder is not None:
            reason = f"{folder} states its strength; leave out --lora-alpha"
        raise OptionError(f"{reason} and --rank-stabilised")
    if adapter is None:
        return source
    form = FORM_OF[options.format] if options.adapter == "keep" else None
    return AdaptedSource(source, config, adapter, files, form)


def check_kept(adapted: AdaptedSource, quantized: bool) -> None:
    """Raise an error for an adapter that cannot lie beside its base, whose embedding may be
    quantized: `OptionError` for DoRA on that, `ConversionError` for DoRA as another form has it.
    """
    parts = adapted.adapter.parts
    dora = any(part.magnitude is not None for part in parts.values())  # then so are all layers
    if quantized and dora and EMBEDDINGS in parts:
        raise OptionError(
            "mlx-lm applies no DoRA adapter to a quantized embedding; merge it, or leave the base "
            "unquantized"
        )
    check_embedding(adapted.adapter, str(adapted.form))


def write_kept(folder: Path, adapted: AdaptedSource, config: OpenELMConfig) -> None:
    """Write the adapter, once `check_kept` has passed it, beside its base of `config`."""
    form, adapter = str(adapted.form), adapted.adapter
    adapter = replace(adapter, parts=with_rows(adapter.parts, config.vocab_size))
    adapter = with_lengths(adapter, adapted.base_weight, form)
    adapter = replace(adapter, base=adapted.fingerprint())
    write_adapter(folder, adapter, form, config)


def with_lengths(adapter: Adapter, weight: Callable[[str], mx.array], form: str) -> Adapter:
    """Return the same adapter in one kind, as `form` wants it: beside DoRA, a layer of LoRA becomes
    DoRA whose magnitudes are the lengths that it has anyway. `weight` returns the base of a stem.
    """
    parts = dict(adapter.parts)
    if any(part.magnitude is not None for part in parts.values()):
        for stem, part in parts.items():
            if part.magnitude is None:
                merged = part.merged(weight(stem)[: len(part.b)])
                of_columns = form == "peft" and stem == EMBEDDINGS
                parts[stem] = replace(part, magnitude=lengths(merged, of_columns))
    return replace(adapter, parts=parts)
