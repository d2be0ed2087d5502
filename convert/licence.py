"""The licence of the weights goes along with a conversion: what the source says, no more."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from openelm_mlx.engine.hub import SHORT_NAMES, is_published

if TYPE_CHECKING:
    from openelm_mlx.convert.options import ConvertOptions
    from openelm_mlx.convert.sources import TensorSource

KEYS = ("license", "license_name", "license_link")  # of a model card on Hugging Face
FRONT_MATTER_BYTES = 1 << 16
ENTRY = re.compile(rf"^({'|'.join(KEYS)})[ \t]*:[ \t]*([^\s#].*?)[ \t]*$", re.MULTILINE)
SAMPLE_CODE = "apple-sample-code-license"
CORENET = {
    "license": "other",
    "license_name": SAMPLE_CODE,
    "license_link": "https://github.com/apple/corenet/blob/main/LICENSE",
}


@dataclass(frozen=True)
class Licence:
    """Entries of a model card, by `KEYS`, and the files with the text; empty where none is
    known.
    """

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
    files = tuple(path for path in sorted(folder.glob("LICEN[SC]E*")) if path.is_file())
    entries = dict(source.licence) or front_matter(folder / "README.md")
    entries = entries or of_name(options.source_name or "")
    link = entries.get("license_link", "")
    if "://" not in link and link not in [path.name for path in files]:
        entries.pop("license_link", None)  # it would lead nowhere
    return Licence(entries, files)


def front_matter(card: Path) -> dict[str, str]:
    """The `KEYS` that a model card gives as plain text in its front matter."""
    try:
        with open(card, "rb") as file:
            text = file.read(FRONT_MATTER_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return {}
    match = re.match(r"---\n(.*?)\n---", text.replace("\r\n", "\n"), re.DOTALL)
    found = [] if match is None else [(k, v.strip("'\"")) for k, v in ENTRY.findall(match[1])]
    return {key: value for key, value in found if value}


def of_name(name: str) -> dict[str, str]:
    """Apple's terms, by the name under which Apple published the weights."""
    if is_published(name):
        return dict(CORENET)
    hub_id = SHORT_NAMES.get(name.lower(), name)
    if hub_id.lower().startswith("apple/openelm-"):
        link = f"https://huggingface.co/{hub_id}/blob/main/LICENSE"
        return {"license": "apple-amlr", "license_name": SAMPLE_CODE, "license_link": link}
    return {}
