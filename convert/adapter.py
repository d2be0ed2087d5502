"""An adapter alone is turned from one form into another; of its base only the configuration is
read.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields, replace

from openelm_mlx.convert.options import ConvertOptions
from openelm_mlx.convert.record import TOOL, ConversionReport
from openelm_mlx.convert.sources.adapters import CONFIG, FORM_OF
from openelm_mlx.convert.targets import staged
from openelm_mlx.convert.targets.checks import check_apart, write_record
from openelm_mlx.dtypes import name_of
from openelm_mlx.engine.adapter_files import read_adapter, shortest, write_adapter
from openelm_mlx.engine.hub import BUNDLED
from openelm_mlx.errors import ConversionError, OptionError
from openelm_mlx.files import read_header, read_json
from openelm_mlx.model.config import PUBLISHED, OpenELMConfig, normal_name
from openelm_mlx.model.peft import SETTINGS

TAKEN = ("source", "target", "target_format", "config", "force", "dry_run", "source_name")
BASE_KEYS = ("base_model_name_or_path", "model")  # PEFT's and mlx-lm's


@dataclass(frozen=True)
class AdapterReport(ConversionReport):
    """The outcome for an adapter, whose numbers count, and not its base's."""

    numbers: int = 0

    @property
    def parameters(self) -> int:
        return self.numbers


def convert_adapter(options: ConvertOptions) -> AdapterReport:
    """Write the adapter of `options.source` in the form that `--to` implies.

    Raises `ConversionError`, `CheckpointError`, `ConfigError` or `OptionError`.
    """
    check_options(options)
    raw = read_json(options.source / SETTINGS)
    base_name = next((raw[key] for key in BASE_KEYS if isinstance(raw.get(key), str)), None)
    config = base_config(options, base_name)
    adapter = read_adapter(options.source, config)
    check_apart(options.target, options.inputs)
    parts = set(adapter.parts.values())
    arrays = [x for part in parts for x in (part.a, part.b, part.magnitude) if x is not None]
    numbers, dtype = sum(array.size for array in arrays), shortest(arrays)
    report = AdapterReport(
        target=options.target,
        config=config,
        source_bytes=sum(path.stat().st_size for path in options.source.glob("*.safetensors")),
        written_bytes=dtype.size * numbers,
        dropped_rows=0,
        memory_bytes=8 * numbers,
        types={name_of(dtype): list(adapter.parts)},
        numbers=numbers,
    )
    if options.dry_run:
        return report
    with staged(options) as folder:
        write_adapter(folder, adapter, FORM_OF[options.format], config, base_name)
        (file,) = folder.glob("*.safetensors")  # which may have padding, and folded scales
        written = sum(place.info.nbytes for place in read_header(file).values())
        record = {"tool": TOOL, "source": options.shown_source}
        write_record(folder, record)
    return replace(report, written_bytes=written)


def check_options(options: ConvertOptions) -> None:
    """Raise `OptionError` for options that say how a model is written."""
    if options.adapter_folder is not None:
        what = f"{options.source} is an adapter, and so is {options.adapter_folder}"
        raise OptionError(f"{what}; give the model that the second is for in place of the first")
    if options.is_gguf:
        raise OptionError(
            f"{options.source} is an adapter, which becomes no GGUF file; give --to mlx or --to "
            "hf, or its base with --adapter-folder"
        )
    for item in fields(options):
        if item.name not in TAKEN and getattr(options, item.name) != item.default:
            flag = item.metadata.get("flag") or "--" + item.name.replace("_", "-")
            raise OptionError(
                f"{options.source} is an adapter, and {flag} is for a model; leave it out, or give "
                "the adapter's base with --adapter-folder"
            )


def base_config(options: ConvertOptions, name: str | None) -> OpenELMConfig:
    """Return the configuration of the base `name`: `--config`, that of a folder here, of the
    bundled model, or of a published size. Raises `ConversionError` if there is none.
    """
    if options.config is not None:
        return OpenELMConfig.from_file(options.config)
    if name is not None:
        if os.path.isfile(path := os.path.join(name, CONFIG)):
            return OpenELMConfig.from_file(path)
        if name == BUNDLED.name:
            return OpenELMConfig.from_file(BUNDLED / CONFIG)
        if normal_name(name) in PUBLISHED:
            return OpenELMConfig.from_name(name)
    called = "does not name its base" if name is None else f"names its base {name!r:.100}"
    raise ConversionError(
        f"{options.source} {called}, which is no folder here and no published size; give the "
        "config.json of the base as --config"
    )
