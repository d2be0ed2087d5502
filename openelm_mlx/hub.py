"""From a model's name to a folder on this disk; the only importer of huggingface_hub."""

from __future__ import annotations

import difflib
import errno
import hashlib
from dataclasses import dataclass
from pathlib import Path

from .errors import HubError

TOKENIZER_SHA256 = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"
MIRRORS = ("mlx-community/OpenELM-270M", "mlx-community/OpenELM-270M-Instruct")
BUNDLED = Path(__file__).parent / "assets" / "openelm-tiny"
SHORT_NAMES = {size.lower() + kind.lower(): f"apple/OpenELM-{size}{kind}"
               for size in ("270M", "450M", "1_1B", "3B") for kind in ("", "-Instruct")}
SHORT_NAMES = {name.replace("_", "."): hub_id for name, hub_id in SHORT_NAMES.items()}
PATTERNS = ["*.safetensors", "*.json", "tokenizer.*", "*.jinja", "LICENSE*", "README.md"]


@dataclass(frozen=True)
class Resolved:
    folder: Path
    tokenizer: Path | None  # None: look in the folder


def resolve_model(name: str, revision: str | None = None, tokenizer: str | Path | None = None) -> Resolved:
    """Folder of a bundled, local, short-named or hub model; downloads what is missing. Raises HubError."""
    given = Path(tokenizer) if tokenizer else None
    if name == "openelm-tiny":
        return Resolved(BUNDLED, given)
    if Path(name).is_dir():
        return Resolved(Path(name), given)
    hub_id = SHORT_NAMES.get(name.lower(), name)
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")):
        names = ["openelm-tiny", *SHORT_NAMES]
        close = difflib.get_close_matches(name.lower(), names, n=3) or names
        raise HubError(f"unknown model {name!r}; did you mean {', '.join(close)}? "
                       "A folder or a hub id (owner/name) will do too")
    folder = _snapshot(hub_id, revision)
    if given is None and hub_id.startswith("apple/OpenELM-"):
        given = mirrored_tokenizer()
    return Resolved(folder, given)


def _snapshot(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(hub_id, revision=revision, allow_patterns=PATTERNS))
    except Exception as error:
        raise HubError(_explain(hub_id, error)) from error


def mirrored_tokenizer() -> Path:
    from huggingface_hub import hf_hub_download

    problems = []
    for mirror in MIRRORS:
        try:
            path = Path(hf_hub_download(mirror, "tokenizer.model"))
        except Exception as error:
            problems.append(_explain(mirror, error))
            continue
        if hashlib.sha256(path.read_bytes()).hexdigest() == TOKENIZER_SHA256:
            return path
        problems.append(f"{mirror}: tokenizer.model has the wrong hash")
    raise HubError(f"no mirror gave the tokenizer ({'; '.join(problems)}); pass --tokenizer")


def _explain(hub_id: str, error: Exception) -> str:
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status in (401, 403):
        return f"{hub_id} is private, gated or does not exist (HTTP {status}); check the id or log in: hf auth login"
    if status == 404:
        return f"{hub_id} or its revision was not found on the hub (HTTP 404); check the spelling"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"the disk is full while fetching {hub_id}; free some space and run the same command, it resumes"
    return f"cannot fetch {hub_id} ({type(error).__name__}) and it is not cached; check the network and try again"
