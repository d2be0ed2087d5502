"""One self-contained HTML page of a document: tables, light and dark pictures, machine facts.

It asks no network for anything and runs no script. Every text of the document is escaped, because
names of models and notes are anyone's.
"""

from __future__ import annotations

import base64
from dataclasses import asdict
from pathlib import Path
from typing import Any

from openelm_mlx.benchmarks.results import tables
from openelm_mlx.benchmarks.results.document import Document, write_file
from openelm_mlx.benchmarks.results.plots import Picture, pictures, svg
from openelm_mlx.drawing import DARK, LIGHT
from openelm_mlx.errors import OptionError

TEMPLATE = Path(__file__).with_name("page.html.j2")


def write_page(document: Document, path: str | Path) -> None:
    """Write the page. Without matplotlib it has no pictures and says what to install.

    Raises `BenchmarkError` if the file cannot be written; an older file is then left as it was.
    """
    write_file(path, render(document))


def render(document: Document) -> str:
    from jinja2 import Environment, StrictUndefined

    missing, drawn = "", []
    try:
        drawn = [(one, uri(one, LIGHT), uri(one, DARK)) for one in pictures(document)]
    except OptionError as error:
        missing = str(error)
    parts = [
        (model, tables.constants(rows), tables.grid(rows))
        for model, rows in tables.by_model(document.rows).items()
    ]
    if document.ratios:
        parts.append(("Ratios", "of paired trials", tables.ratio_grid(document)))
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        document=document,
        title=f"OpenELM benchmark: {document.machine.chip or 'unknown machine'}",
        not_a_mac=tables.not_a_mac(document.machine),
        pictures=drawn,
        missing=missing,
        parts=parts,
        notes=tables.notes(document),
        facts=facts(document),
    )


def uri(picture: Picture, theme: Any) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg(picture, theme)).decode()


def facts(document: Document) -> list[tuple[str, str]]:
    """Return what is known of the machine, the versions and the run, in words."""
    machine = [
        (
            name.removesuffix("_per_second").removesuffix("_bytes").replace("_", " "),
            fact(name, value),
        )
        for name, value in asdict(document.machine).items()
        if value is not None
    ]
    run = {
        "commit": document.commit and document.commit + " with changes" * bool(document.dirty),
        "measured": document.created.replace("T", " ").replace("Z", " UTC"),
        "suite": document.suite or "none, single cases",
        "processes": str(document.processes),
    }
    known = [(name, value) for name, value in run.items() if value]
    return [*machine, *document.versions.items(), *known]


def fact(name: str, value: Any) -> str:
    if name.endswith("_bytes_per_second"):
        return f"{value / 1e9:.1f} GB/s"
    if name.endswith("_bytes"):
        return f"{value / 2**30:.0f} GiB"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
