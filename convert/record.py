"""conversion.json and the model card: where a folder came from, how it was made, and what it lost
on the way.
"""

from __future__ import annotations

import hashlib
import platform
import shlex
import threading
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from openelm_mlx import __version__
from openelm_mlx.convert.options import ConvertOptions
from openelm_mlx.convert.quantize.plan import number_of, role
from openelm_mlx.quantization import Plan, QuantSpec, config_entry

CHUNK = 1 << 22
MERGED, KEPT = "merged", "kept beside its base"


class SourceHash:
    """SHA-256 of every weight file of a source, computed beside the conversion (hashing frees the
    interpreter).
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = list(files)
        self._hashes: dict[str, str] = {}
        self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        for path in self.files:
            digest = hashlib.sha256()
            try:
                with path.open("rb") as file:
                    while not self._stop and (chunk := file.read(CHUNK)):
                        digest.update(chunk)
            except OSError:  # the conversion itself reports what cannot be read
                return
            self._hashes[path.name] = digest.hexdigest()

    def result(self) -> dict[str, str]:
        self._thread.join()
        return dict(self._hashes)

    def stop(self) -> None:
        self._stop = True
        self._thread.join()


def command_line(options: ConvertOptions) -> str:
    """The command that asks for these options; files by name only, without paths of the machine it
    ran on.
    """
    words = ["openelm", "convert", options.shown_source, "-o", options.target.name]
    for item in fields(options):
        value = getattr(options, item.name)
        default = None if item.default is MISSING else item.default
        if item.name in ("source", "target", "source_name", "force", "dry_run") or value == default:
            continue
        flag = item.metadata.get("flag") or "--" + item.name.replace("_", "-")
        if isinstance(value, bool):
            words.append(flag if value else "--no-" + flag.removeprefix("--"))
        else:
            plain = (
                Path(value).name if isinstance(value, Path) or item.name == "recipe" else str(value)
            )
            words += [flag, plain]
    return shlex.join(words)


def conversion_record(
    options: ConvertOptions,
    forms: Plan,
    dtype: str,
    parameters: int,
    written_bytes: int,
    dropped_rows: int,
    measured: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of conversion.json, but for the source's hash and the verification, which end
    with the work.
    """
    return {
        "tool": "openelm-mlx",
        "version": __version__,
        "versions": {"mlx": version("mlx"), "python": platform.python_version()},
        "command": command_line(options),
        "source": options.shown_source,
        "parameters": parameters,
        "dtype": dtype,
        "quantization": config_entry(forms),
        "bytes": written_bytes,
        "bits_per_weight": round(8 * written_bytes / parameters, 4),
        "dropped_embedding_rows": dropped_rows,
        "instruct": options.is_instruct,
        **({"calibration": dict(measured)} if measured else {}),
    }


def model_card(record: Mapping[str, Any], forms: Plan, instruct: bool) -> str:
    """README.md of a model folder."""
    kinds = {form for form in forms.values() if form is not None}
    kind = (
        record["dtype"]
        if not kinds
        else str(next(iter(kinds)))
        if len(kinds) == 1
        else "quantized by layer"
    )
    chat = "It speaks OpenELM's Instruct format; see `chat_template.jinja`.\n" if instruct else ""
    parts = [
        f"---\n{card_entries(record)}---\n\n# OpenELM for MLX\n\n"
        f"{record['parameters']:,} parameters, {kind}, {record['bits_per_weight']:.3f} bits per weight. Converted from "
        f"`{record['source']}` with openelm-mlx {record['version']}. {chat}\n"
        '```\nopenelm chat PATH_OF_THIS_FOLDER\nmlx_lm.generate --model PATH_OF_THIS_FOLDER --prompt "Once upon a time"\n'
        f"```\n\n## How it was made\n\n```\n{record['command']}\n```\n"
    ]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    parts.append(f"With {versions}. {record['bytes']:,} bytes of weights.\n")
    for name, digest in record.get("source_sha256", {}).items():
        parts.append(f"- `{name}`: sha256 `{digest}`\n")
    if record.get("adapter") == KEPT:
        parts.append(
            "\nThese are the weights of the base; the adapter lies in `adapter` "
            "(`mlx_lm.generate --adapter-path PATH_OF_THIS_FOLDER/adapter`).\n"
        )
    if len(set(forms.values())) > 1:
        parts.append("\n" + form_table_markdown(forms) + "\n")
    if verification := record.get("verification"):
        parts.append(
            f"\nAgainst the source in float32, on {record.get('verification_text') or 'a short text'}:\n\n"
        )
        parts.append("| | |\n|---|---|\n")
        parts += [f"| {label(key)} | {value:.6g} |\n" for key, value in verification.items()]
    parts.append("\nThe weights stay under the licence of the model they were converted from.\n")
    return "".join(parts)


def card_entries(record: Mapping[str, Any]) -> str:
    """The card's front matter, as Hugging Face reads it."""
    import yaml

    entries = {**record.get("license", {}), "library_name": "mlx", "tags": ["mlx", "openelm"]}
    return str(yaml.safe_dump(entries, sort_keys=False))


def label(key: str) -> str:
    return key.replace("_", " ")


def form_rows(forms: Plan) -> tuple[list[str], list[list[str]]]:
    """The plan as a table: a column for each role, a row for each layer, one for what belongs to no
    layer.
    """
    roles = list(dict.fromkeys(role(stem) for stem in forms if number_of(stem) >= 0))
    rows = [
        [role(stem), short(form), *[""] * (len(roles) - 1)]
        for stem, form in forms.items()
        if number_of(stem) < 0
    ]
    layers = sorted({number_of(stem) for stem in forms} - {-1})
    by_place = {(number_of(stem), role(stem)): short(form) for stem, form in forms.items()}
    rows += [[f"layer {number}", *(by_place[number, name] for name in roles)] for number in layers]
    return ["", *roles], rows


def short(form: QuantSpec | None) -> str:
    """5 bits in groups of 64 as 5/64."""
    if form is None:
        return "whole"
    return f"{form.bits}/{form.group_size}" if form.mode == "affine" else form.mode


def form_table_markdown(forms: Plan) -> str:
    heads, rows = form_rows(forms)
    lines = [
        "Bits and group size by layer:",
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
    ]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows]) + "\n"
