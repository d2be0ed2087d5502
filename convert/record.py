"""The records of a conversion: the report, conversion.json, the model card, and the licence that
goes along with the weights.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import threading
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from openelm_mlx import __version__
from openelm_mlx.convert.options import ConvertOptions
from openelm_mlx.convert.quantize.recipes import role
from openelm_mlx.convert.sources import LICENCE_KEYS, TensorSource, number_of
from openelm_mlx.device import facts
from openelm_mlx.engine.hub import SHORT_NAMES, is_published
from openelm_mlx.evaluate.compare import losses_shown
from openelm_mlx.evaluate.perplexity import TEXT_NAME
from openelm_mlx.fields import encodable, in_utf8
from openelm_mlx.model.config import OpenELMConfig
from openelm_mlx.quantization import Plan, QuantSpec, config_entry

CHUNK = 1 << 22
TOOL = "openelm-mlx"
MERGED, KEPT = "merged", "kept beside its base"
FRONT_MATTER_BYTES = 1 << 16
ENTRY = re.compile(rf"^({'|'.join(LICENCE_KEYS)})[ \t]*:[ \t]*([^\s#].*?)[ \t]*$", re.MULTILINE)
SAMPLE_CODE = "apple-sample-code-license"
CORENET = {
    "license": "other",
    "license_name": SAMPLE_CODE,
    "license_link": "https://github.com/apple/corenet/blob/main/LICENSE",
}


@dataclass(frozen=True)
class ConversionReport:
    """The outcome of a conversion, or of its dry run. Bytes are those of the weights."""

    target: Path
    config: OpenELMConfig
    source_bytes: int
    written_bytes: int
    dropped_rows: int  # of the embeddings: those without a piece of the tokenizer
    memory_bytes: int = 0  # an estimate of the peak, beside the interpreter
    seconds: float | None = None  # how long it will take, about; known in a dry run
    plan: Plan = field(default_factory=dict)
    types: Mapping[str, list[str]] = field(default_factory=dict)
    """The tensors of each type, by stem; see `Target.types`."""
    source_quantization: Mapping[str, int] = field(default_factory=dict)
    """The kinds of quantization in the source, as in "Q4_K", and the number of matrices of each."""
    rounded_again: int = 0  # of these matrices: those that are quantized in another way, or anew
    dequantized: int = 0  # of these matrices
    notes: tuple[str, ...] = ()
    """Sentences on what is not quite as it was asked for."""
    measured: Mapping[str, Any] = field(default_factory=dict)
    """Figures that were found while the plan was chosen and rounding was learned."""
    activations: Mapping[str, Any] = field(default_factory=dict)  # if measured: activations.py
    verification: Mapping[str, Any] | None = None
    """The losses against the source, if asked for."""

    @property
    def parameters(self) -> int:
        return self.config.num_parameters

    @property
    def dtype(self) -> str:
        """The type of all tensors, "mixed" if they differ."""
        return next(iter(self.types)) if len(self.types) == 1 else "mixed"

    @property
    def dtypes(self) -> dict[str, list[str]]:
        """The tensors of each type, by stem, if they differ."""
        return dict(self.types) if len(self.types) > 1 else {}

    @property
    def types_in_words(self) -> str:
        if self.dtype != "mixed":
            return self.dtype
        return ", ".join(f"{dtype} ({len(of)} tensors)" for dtype, of in self.types.items())

    @property
    def loss_of_source(self) -> str | None:
        """A sentence on the quantization of the source, None if it had none or all of it is kept.

        It can be written before the weights are.
        """
        how = " and ".join(self.source_quantization)
        if self.rounded_again:
            what = (
                f"{self.rounded_again} matrices are rounded a second time, which adds to its loss"
            )
            remedy = "the original, if you have it, gives a better result"
            return f"The source is itself quantized ({how}): {what}; {remedy}."
        if self.dequantized:
            return f"The source is itself quantized ({how}): what that has lost stays lost."
        return None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.written_bytes / self.parameters


@dataclass(frozen=True)
class Licence:
    """Entries of a model card, by `LICENCE_KEYS`, and the files that contain the text."""

    entries: dict[str, str]
    files: tuple[Path, ...]

    @property
    def without_files(self) -> dict[str, str]:
        """The entries that mean something without the files beside them."""
        return {k: v for k, v in self.entries.items() if k != "license_link" or "://" in v}


def licence_of(source: TensorSource, options: ConvertOptions) -> Licence:
    """Return the terms that the weights name, else those of the card beside them.

    Where neither names any, names under which Apple published get Apple's terms.
    """
    folder = options.source if options.source.is_dir() else options.source.parent
    files = licence_files(folder)
    entries = dict(source.licence) or front_matter(folder / "README.md")
    entries = entries or licence_of_name(options.source_name or "")
    link = entries.get("license_link", "")
    if "://" not in link and link not in [path.name for path in files]:
        entries.pop("license_link", None)  # it would lead nowhere
    return Licence(entries, files)


def licence_files(folder: Path) -> tuple[Path, ...]:
    """Return the files of a folder that have the text of a licence."""
    found = sorted(folder.glob("LICEN[SC]E*"))
    return tuple(path for path in found if path.is_file() and encodable(path.name))


def front_matter(card: Path) -> dict[str, str]:
    """Return the `LICENCE_KEYS` that a model card gives as plain text in its front matter."""
    try:
        with open(card, "rb") as file:
            text = file.read(FRONT_MATTER_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return {}
    match = re.match(r"---\n(.*?)\n---", text.replace("\r\n", "\n"), re.DOTALL)
    found = [] if match is None else [(k, v.strip("'\"")) for k, v in ENTRY.findall(match[1])]
    return {key: value for key, value in found if value}


def licence_of_name(name: str) -> dict[str, str]:
    """Return Apple's terms for a name under which Apple published weights."""
    if is_published(name):
        return dict(CORENET)
    hub_id = SHORT_NAMES.get(name.lower(), name)
    if hub_id.lower().startswith("apple/openelm-"):
        link = f"https://huggingface.co/{hub_id}/blob/main/LICENSE"
        return {"license": "apple-amlr", "license_name": SAMPLE_CODE, "license_link": link}
    return {}


class SourceHash:
    """The SHA-256 of every weight file of a source, computed on a thread beside the conversion
    (hashing frees the interpreter). Leaving the context stops it.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files = list(files)
        self._hashes: dict[str, str] = {}
        self._stop = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> SourceHash:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop = True
        self._thread.join()

    def _run(self) -> None:
        for path in self.files:
            digest = hashlib.sha256()
            try:
                with path.open("rb") as file:
                    while not self._stop and (chunk := file.read(CHUNK)):
                        digest.update(chunk)
            except OSError:  # the conversion itself reports what cannot be read
                return
            self._hashes[in_utf8(path.name)] = digest.hexdigest()

    def result(self) -> dict[str, str]:
        """Return the hashes by file name, once they are complete."""
        self._thread.join()
        return dict(self._hashes)


def command_line(options: ConvertOptions) -> str:
    """Return the command that asks for these options, with files by name only: the paths of the
    machine it ran on are left out.
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
            is_path = isinstance(value, Path) or item.name == "recipe"
            words += [flag, Path(value).name if is_path else str(value)]
    return in_utf8(shlex.join(words))


def conversion_record(
    options: ConvertOptions,
    report: ConversionReport,
    licence: Licence,
    adapter: str | None,
    hashes: Mapping[str, str],
) -> dict[str, Any]:
    """Return the content of conversion.json."""
    found = facts()
    record: dict[str, Any] = {
        "tool": TOOL,
        "version": __version__,
        "versions": {name: found[name] for name in ("mlx", "python")},
        "command": command_line(options),
        "source": options.shown_source,
        "parameters": report.parameters,
        "dtype": report.dtype,
        "quantization": config_entry(report.plan),
        "bytes": report.written_bytes,
        "bits_per_weight": round(report.bits_per_weight, 4),
        "dropped_embedding_rows": report.dropped_rows,
        "instruct": options.is_instruct,
    }
    if report.dtypes:
        record["dtypes"] = report.dtypes
    if report.source_quantization:
        record["source_quantization"] = dict(report.source_quantization)
        record["rounded_again"] = report.rounded_again
        record["dequantized"] = report.dequantized
    parts = ("calibration", report.measured), ("activations", report.activations)
    for name, content in (*parts, ("license", licence.entries)):
        if content:
            record[name] = dict(content)
    if adapter is not None:
        record["adapter"] = adapter
    if report.verification is not None:
        text = options.verify_text
        record["verification"] = dict(report.verification)
        record["verification_text"] = TEXT_NAME if text is None else text.name
    return record | {"source_sha256": dict(hashes)}


def model_card(record: Mapping[str, Any], report: ConversionReport, instruct: bool) -> str:
    """Return README.md of a model folder."""
    plan = report.plan
    specs = {spec for spec in plan.values() if spec is not None}
    kind = "quantized by layer" if specs else report.types_in_words
    if len(specs) == 1:
        kind = str(next(iter(specs)))
    chat = "It speaks OpenELM's Instruct format; see `chat_template.jinja`.\n" if instruct else ""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    parts = [
        f"---\n{card_entries(record)}---\n\n# OpenELM for MLX\n\n"
        f"{record['parameters']:,} parameters, {kind}, {record['bits_per_weight']:.3f} bits per "
        f"weight. Converted from `{record['source']}` with openelm-mlx {record['version']}. "
        f"{chat}\n```\nopenelm chat PATH_OF_THIS_FOLDER\n"
        'mlx_lm.generate --model PATH_OF_THIS_FOLDER --prompt "Once upon a time"\n'
        f"```\n\n## How it was made\n\n```\n{record['command']}\n```\n"
        f"With {versions}. {record['bytes']:,} bytes of weights.\n"
    ]
    parts += [
        f"- `{name}`: sha256 `{digest}`\n" for name, digest in record["source_sha256"].items()
    ]
    if report.loss_of_source is not None:
        parts.append(f"\n{report.loss_of_source}\n")
    if record.get("adapter") == KEPT:
        parts.append(
            "\nThese are the weights of the base; the adapter lies in `adapter` (`openelm chat "
            "PATH_OF_THIS_FOLDER --adapter PATH_OF_THIS_FOLDER/adapter`).\n"
        )
    if len(set(plan.values())) > 1:
        heads, rows = plan_rows(plan)
        parts.append("\nBits and group size by layer:\n\n" + markdown([heads, *rows]) + "\n")
    if verification := record.get("verification"):
        text = record["verification_text"]
        parts.append(f"\nAgainst the source in float32, on {text}:\n\n| | |\n|---|---|\n")
        parts += [f"| {name} | {value} |\n" for name, value in losses_shown(verification)]
    parts.append("\nThe weights stay under the licence of the model they were converted from.\n")
    return "".join(parts)


def card_entries(record: Mapping[str, Any]) -> str:
    """Return the card's front matter, as Hugging Face reads it."""
    import yaml

    entries = {**record.get("license", {}), "library_name": "mlx", "tags": ["mlx", "openelm"]}
    return str(yaml.safe_dump(entries, sort_keys=False))


def plan_rows(plan: Plan) -> tuple[list[str], list[list[str]]]:
    """Return the plan as a table: a column for each role, a row for each layer, one for each matrix
    that belongs to no layer.
    """
    roles = list(dict.fromkeys(role(stem) for stem in plan if number_of(stem) >= 0))
    blank = [""] * (len(roles) - 1)
    rows = [[role(stem), short(plan[stem]), *blank] for stem in plan if number_of(stem) < 0]
    by_place = {(number_of(stem), role(stem)): short(spec) for stem, spec in plan.items()}
    for number in sorted({number_of(stem) for stem in plan} - {-1}):
        rows.append([f"layer {number}", *(by_place[number, name] for name in roles)])
    return ["", *roles], rows


def short(spec: QuantSpec | None) -> str:
    """Return 5/64 for 5 bits in groups of 64."""
    if spec is None:
        return "unquantized"
    return f"{spec.bits}/{spec.group_size}" if spec.mode == "affine" else spec.mode


def markdown(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    return "\n".join(lines) + "\n"
