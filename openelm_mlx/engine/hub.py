"""From a model's name to a folder on this disk. The engine uses huggingface_hub only here."""

from __future__ import annotations

import difflib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from openelm_mlx.engine.model_cache import WEIGHT_SUFFIXES, convert_once, recall
from openelm_mlx.engine.tokenizer import FILES
from openelm_mlx.errors import CheckpointError, ConfigError, HubError, OptionError, TokenizerError
from openelm_mlx.files import INDEX, WEIGHTS, read_json, read_places
from openelm_mlx.model.config import PUBLISHED, is_corenet_section
from openelm_mlx.model.names import ADAPTER

TOKENIZER_SHA256 = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"
MIRRORS = ("mlx-community/OpenELM-270M", "mlx-community/OpenELM-270M-Instruct")
BUNDLED = Path(__file__).parents[1] / "assets" / "openelm-tiny"
SHORT_NAMES = {
    f"{size}{kind}".lower(): f"apple/OpenELM-{size.upper().replace('.', '_')}{kind}"
    for size in PUBLISHED
    for kind in ("", "-Instruct")
}
LICENCE = ["LICENSE*", "README.md"]
PATTERNS = ["*.safetensors", "*.json", "*.yaml", "tokenizer.*", "*.jinja", *LICENCE]
OTHER_WEIGHTS = [".gguf", ".pt", ".bin"]  # fetched from a repository without safetensors
LLAMA_ROWS = range(32000, 32257)  # rows of an embedding that LLaMA's tokenizer fits, with padding
CORENET = "corenet"  # names of the converter's catalog begin so, with -mlx and a colon
# no hub id ends so
FILE_SUFFIXES = (*WEIGHT_SUFFIXES, ".json", ".yaml", ".yml", ".npz", ".model", ".txt", ".zip")
CERTIFICATE_REMEDY = (
    "behind a proxy that reads TLS set SSL_CERT_FILE to its certificate, "
    "and check this machine's date"
)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
UNWRITABLE = (PermissionError, NotADirectoryError, FileExistsError)
MODELS = (
    "a folder, a .gguf file, a CoreNet checkpoint (.pt), a hub id (owner/name) "
    "or a name from `openelm models`"
)


@dataclass(frozen=True)
class Resolved:
    """The place of a model on this disk; `tokenizer` is None if the folder has one."""

    folder: Path
    tokenizer: Path | None


def resolve_model(
    name: str, revision: str | None = None, tokenizer: str | Path | None = None
) -> Resolved:
    """Find the folder of a model by its name or path; fetch and convert what is not there yet.

    `revision` is a branch, tag or commit on the hub. Raises `HubError` for what cannot be found or
    fetched, another `OpenELMError` for what is found and is not a model.
    """
    given = Path(os.path.expanduser(tokenizer)) if tokenizer else None
    here, hub_id = Path(os.path.expanduser(name)), None
    if name != "openelm-tiny" and not (name and os.path.exists(here)) and not is_published(name):
        hub_id = hub_id_of(name)
    if hub_id is None and revision is not None:
        what = f"--revision {revision} chooses a version on the hub"
        raise OptionError(f"{what}; {name} does not come from there")
    if name == "openelm-tiny":
        return Resolved(BUNDLED, given)
    if hub_id is None and os.path.exists(here):
        try:
            return as_loaded(here, given)
        except OSError as error:
            raise HubError(f"{name} cannot be read: {error.strerror or error}") from None
    if hub_id is None:
        from openelm_mlx.convert.fetch import published_model

        return Resolved(published_model(name, given), None)
    folder = snapshot(hub_id, revision)
    if given is None and hub_id.startswith("apple/OpenELM-"):
        given = mirrored_tokenizer()
    return as_loaded(folder, given, hub_id)


def as_loaded(source: Path, tokenizer: Path | None, name: str | None = None) -> Resolved:
    """Return `source` itself, or its conversion if the engine cannot load it."""
    if source.is_dir() and loadable(source):
        return Resolved(source, tokenizer)
    return Resolved(converted(source, tokenizer, name), None)


def converted(source: Path, tokenizer: Path | None = None, name: str | None = None) -> Path:
    """Return the model folder of `source`, found in the cache or converted into it now.

    `name` is the user's name of the source, if that is not a path. Raises an `OpenELMError` for
    what convert cannot read, and if the result cannot be written.
    """
    source = Path(os.path.abspath(source))
    if (known := recall(source, tokenizer)) is not None:
        return known
    check_kind(source)
    return convert_once(source, tokenizer, tokenizer or missing_tokenizer(source), name)


def loadable(folder: Path) -> bool:
    """Return whether the engine should load this folder as it is, without a conversion.

    A damaged folder counts as loadable: the errors of loading describe the damage best.
    """
    if not (folder / "config.json").is_file():
        return False
    if not any((folder / name).is_file() for name in (INDEX, WEIGHTS)):
        return False
    try:
        corenets = is_corenet_section(read_json(folder / "config.json"))
        places = read_places(folder)
    except (CheckpointError, ConfigError):
        return True
    others = any(ADAPTER.search(name) for name in places)  # an adapter has to be merged
    doubles = any(place.info.dtype == "float64" for place in places.values())  # MLX reads none
    return not (corenets or others or doubles)


def check_kind(source: Path) -> None:
    """Raise `CheckpointError` for a folder without weights, or a file that is not a model."""
    from openelm_mlx.convert.sources import kind_of, weights_by_kind

    if source.is_dir() and not weights_by_kind(source):
        loaded = "no model.safetensors with config.json"
        converted = "no checkpoint.pt or .gguf file that could be converted"
        raise CheckpointError(f"{source} has {loaded}, and {converted}; a model is {MODELS}")
    known = source.suffix.lower() in WEIGHT_SUFFIXES
    if source.is_file() and not known and kind_of(source) is None:
        raise CheckpointError(f"{source} is a file, but not a model; a model is {MODELS}")


def missing_tokenizer(source: Path, source_format: str | None = None) -> Path | None:
    """Fetch LLaMA's tokenizer for a checkpoint that has its vocabulary and comes without one.

    Return None if it is not needed. Raises `ConversionError` for what convert cannot read, and
    `TokenizerError` if no mirror can be reached.
    """
    from openelm_mlx.convert.opening import open_source

    folder = source if source.is_dir() else source.parent
    opened = open_source(source, source_format)
    if opened.tokenizer is not None or any((folder / name).is_file() for name in FILES):
        return None
    tables = [name for name in opened.tensors if name.endswith("token_embeddings.weight")]
    if not tables or opened.tensors[tables[0]].shape[0] not in LLAMA_ROWS:
        return None
    try:
        return mirrored_tokenizer()
    except HubError as error:
        raise TokenizerError(f"there is no tokenizer beside {source}, and {error}") from None


def is_published(name: str) -> bool:
    """Return whether `name` is spelled like one of convert's catalog, even if it is not there."""
    return name.lower().startswith((f"{CORENET}:", f"{CORENET}-mlx:"))


def looks_like_path(name: str) -> bool:
    """Return whether `name` can only mean a file or folder, and the hub need not be asked."""
    if name.startswith((".", "/", "~")) or name.endswith("/") or "\\" in name:
        return True
    return name.count("/") > 1 or os.path.splitext(name)[1].lower() in FILE_SUFFIXES


def hub_id_of(name: str) -> str:
    """Return the hub id of a short name, or `name` if it is an id. Raises `HubError`."""
    link = os.path.islink(os.path.expanduser(name))
    if link or looks_like_path(name):
        place = f"{name} behind this link" if link else name
        raise HubError(f"there is no file or folder {place}; a model is {MODELS}")
    hub_id = SHORT_NAMES.get(name.lower(), name)
    formed = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", hub_id, re.ASCII)
    if formed and ".." not in hub_id and "--" not in hub_id:
        return hub_id
    names = ["openelm-tiny", *SHORT_NAMES]
    close = difflib.get_close_matches(name.lower(), names, n=3)
    meant = f"did you mean {', '.join(close)}? A" if close else "a"
    raise HubError(f"unknown model {name!r}; {meant} model is {MODELS}")


def snapshot(hub_id: str, revision: str | None = None, patterns: list[str] = PATTERNS) -> Path:
    """Return the folder of a model of the hub, fetched if need be. Raises `HubError`.

    Nothing comes from folders inside the repository: they contain other forms of the same model.
    """
    from huggingface_hub import snapshot_download

    fetch = partial(snapshot_download, hub_id, revision=revision, ignore_patterns=["*/*"])
    try:
        folder = Path(fetch(allow_patterns=patterns))
    except Exception as error:  # the client and the libraries below it raise all kinds
        try:  # a cached copy that lacks only the licence will do
            known = [pattern for pattern in patterns if pattern not in LICENCE]
            folder = Path(fetch(allow_patterns=known, local_files_only=True))
        except Exception:
            raise HubError(explain(hub_id, revision, error)) from error
    suffixes = (".safetensors", *OTHER_WEIGHTS)
    if patterns is PATTERNS and not any(any(folder.glob(f"*{end}")) for end in suffixes):
        return snapshot(hub_id, revision, [other_weights(hub_id, revision)])
    return folder


def other_weights(hub_id: str, revision: str | None) -> str:
    """Return the one file of weights of a repository without safetensors. Raises `HubError`."""
    from huggingface_hub import HfApi

    try:
        names = HfApi().list_repo_files(hub_id, revision=revision)
    except Exception as error:
        raise HubError(explain(hub_id, revision, error)) from error
    for suffix in OTHER_WEIGHTS:
        found = [name for name in names if name.endswith(suffix) and "/" not in name]
        if len(found) == 1:
            return found[0]
        if found:
            what = f"{hub_id} has {len(found)} {suffix} files on the hub ({', '.join(found)})"
            raise HubError(f"{what}; fetch one with `hf download {hub_id} FILE`, and give its path")
    what = f"{hub_id} has no weights on the hub (safetensors, .gguf, .pt or .bin)"
    remedy = f"see its page, or `openelm models remove {hub_id}` and fetch it again"
    raise HubError(f"{what}, or was fetched in part only; {remedy}")


def mirrored_tokenizer() -> Path:
    """Fetch LLaMA's tokenizer.model, which Apple's repositories lack. Raises `HubError`."""
    problems = []
    for mirror in MIRRORS:
        try:
            path = snapshot(mirror, patterns=["tokenizer.model"]) / "tokenizer.model"
        except HubError as error:
            problems.append(str(error))
            if status_of(error) is None:  # the hub itself is out of reach, so is the other mirror
                break
            continue
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == TOKENIZER_SHA256:
            return path
        problems.append(f"{mirror}: tokenizer.model is missing or has the wrong hash")
    what = f"no mirror gave the tokenizer ({'; '.join(problems)})"
    raise HubError(f"{what}; give one with --tokenizer")


def hub_cache() -> Path:
    """Return the folder in which the hub's client keeps its downloads."""
    from huggingface_hub import constants

    return Path(os.path.expanduser(constants.HF_HUB_CACHE))


def cached_repositories() -> dict[str, Path]:
    """Return the folders in the hub's cache by hub id, interrupted downloads included."""
    found = [path for path in sorted(hub_cache().glob("models--*--*")) if path.is_dir()]
    return {path.name.removeprefix("models--").replace("--", "/"): path for path in found}


def remove_repository(hub_id: str) -> None:
    """Remove all revisions of a model from the hub's cache. Raises `OSError`."""
    from huggingface_hub import scan_cache_dir

    folder, found = cached_repositories()[hub_id], scan_cache_dir()
    repos = frozenset(repo for repo in found.repos if repo.repo_path == folder)
    revisions = [revision.commit_hash for repo in repos for revision in repo.revisions]
    alone = replace(found, repos=repos)  # copies elsewhere share revisions
    alone.delete_revisions(*revisions).execute()
    if folder.exists():  # what an interrupted download left is not a revision
        shutil.rmtree(folder)


def explain(hub_id: str, revision: str | None, error: BaseException) -> str:
    """Return one line that says what failed and what to do, by the exception and its causes."""
    from huggingface_hub import constants, errors

    causes = list(chain(error))
    texts, status = [str(cause) for cause in causes], status_of(error)

    def caused_by(kind: Any) -> bool:
        return any(isinstance(cause, kind) for cause in causes)

    if caused_by(errors.HFValidationError):
        what = texts[-1].splitlines()[0].rstrip(".")[:200]
        return f"{hub_id} is not an id of the hub (owner/name): {what}; check the spelling"
    if any(getattr(cause, "errno", None) in FULL for cause in causes):
        remedy = "free some space and run the same command, it resumes"
        return f"the disk is full while fetching {hub_id}; {remedy}"
    # an error of a connection does not have a file name
    if any(isinstance(cause, UNWRITABLE) and cause.filename for cause in causes):
        what = f"{constants.HF_HUB_CACHE} cannot be written, so {hub_id} cannot be fetched"
        return f"{what}; set HF_HUB_CACHE to another folder"
    offline, hub = constants.HF_HUB_OFFLINE, constants.ENDPOINT
    if caused_by(getattr(errors, "IncompleteSnapshotError", ())):
        where = "HF_HUB_OFFLINE is set" if offline else f"{hub} cannot be reached"
        remedy = "run the same command with a network and it fetches the rest"
        what = f"{hub_id} is on this disk in part only, and {where}"
        return f"{what}; {remedy}, or `openelm models remove {hub_id}`"
    if offline:
        what = f"{hub_id} is not on this disk, and HF_HUB_OFFLINE is set"
        return f"{what}; unset it to fetch the model"
    if caused_by(errors.GatedRepoError):
        terms = f"accept its terms at {hub}/{hub_id}"
        return f"{hub_id} is gated (HTTP {status}): {terms}, then log in: hf auth login"
    if caused_by(errors.RevisionNotFoundError):
        what = f"{hub_id} has no revision {revision!r} on the hub (HTTP {status})"
        return f"{what}; check the spelling"
    if status in (401, 403):
        what = f"{hub_id} is private, gated or does not exist (HTTP {status})"
        return f"{what}; check the id or log in: hf auth login"
    # a mistyped path such as models/270m reads like a hub id
    near = os.path.isdir(os.path.dirname(hub_id))
    here = f"; there is no folder {hub_id} here either" if near else ""
    if status == 404:
        return f"{hub_id} was not found on the hub (HTTP 404); check the spelling{here}"
    if status == 429:
        remedy = f"wait some minutes, or log in: hf auth login ({hub_id})"
        return f"the hub limits how often it may be asked (HTTP 429); {remedy}"
    if status is not None:
        return f"{hub} answered with HTTP {status} for {hub_id}; try again later"
    if any("CERTIFICATE_VERIFY_FAILED" in text for text in texts):
        what = f"the certificate of {hub} cannot be verified, so {hub_id} was not fetched"
        return f"{what}; {CERTIFICATE_REMEDY}"
    endpoint = f"{hub} (HF_ENDPOINT)" if os.environ.get("HF_ENDPOINT") else hub
    reason = next((text.splitlines()[0] for text in reversed(texts) if text), "no answer")[:200]
    what = f"{hub_id} is not on this disk and {endpoint} cannot be reached ({reason})"
    return f"{what}; check the network and any proxy, then try again{here}"


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the exception and its causes, the innermost last."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def status_of(error: BaseException) -> int | None:
    """Return the HTTP status that an exception or one of its causes carries, if any."""
    for cause in chain(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(status, int):
            return status
    return None
