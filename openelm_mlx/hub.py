"""From a model's name to a folder on this disk; the only importer of huggingface_hub."""

from __future__ import annotations

import difflib
import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import HubError, OptionError
from .model_cache import converted
from .model_paths import WEIGHT_SUFFIXES, loadable

TOKENIZER_SHA256 = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"
MIRRORS = ("mlx-community/OpenELM-270M", "mlx-community/OpenELM-270M-Instruct")
BUNDLED = Path(__file__).parent / "assets" / "openelm-tiny"
SHORT_NAMES = {
    size.lower() + kind.lower(): f"apple/OpenELM-{size}{kind}"
    for size in ("270M", "450M", "1_1B", "3B")
    for kind in ("", "-Instruct")
}
SHORT_NAMES = {name.replace("_", "."): hub_id for name, hub_id in SHORT_NAMES.items()}
LICENCE = ["LICENSE*", "README.md"]
PATTERNS = ["*.safetensors", "*.json", "tokenizer.*", "*.jinja", *LICENCE]
CORENET = "corenet"  # names of the converter's catalog begin so, with -mlx and a colon
FILE_SUFFIXES = (
    *WEIGHT_SUFFIXES,
    ".json",
    ".yaml",
    ".yml",
    ".npz",
    ".model",
    ".txt",
    ".zip",
)  # no hub id ends so
CERTIFICATE_REMEDY = "behind a proxy that reads TLS set SSL_CERT_FILE to its certificate, and check this machine's date"
UNWRITABLE = (PermissionError, NotADirectoryError, FileExistsError)
MODELS = "a folder, a .gguf file, a CoreNet checkpoint (.pt), a hub id (owner/name) or a name from `openelm models`"


@dataclass(frozen=True)
class Resolved:
    """The place of a model on this disk; `tokenizer` is None where the folder holds one."""

    folder: Path
    tokenizer: Path | None


def resolve_model(
    name: str, revision: str | None = None, tokenizer: str | Path | None = None
) -> Resolved:
    """Find the folder of a model by its name or path; fetch and convert what is not there yet.

    `revision` is a branch, tag or commit on the hub. Raises `HubError` for what cannot be found or
    fetched, another `OpenELMError` for what is found and is no model.
    """
    given = Path(os.path.expanduser(tokenizer)) if tokenizer else None
    here, hub_id = Path(os.path.expanduser(name)), None
    if name != "openelm-tiny" and not (name and os.path.exists(here)) and not is_published(name):
        hub_id = hub_id_of(name)
    if hub_id is None and revision is not None:
        raise OptionError(
            f"--revision {revision} chooses a version on the hub; {name} does not come from there"
        )
    if name == "openelm-tiny":
        return Resolved(BUNDLED, given)
    if hub_id is None and os.path.exists(here):
        try:
            return (
                Resolved(here, given)
                if here.is_dir() and loadable(here)
                else Resolved(converted(here, given), None)
            )
        except OSError as error:
            raise HubError(f"{name} cannot be read: {error.strerror or error}") from None
    if hub_id is None:
        from openelm_mlx.convert.catalog import published_model

        return Resolved(published_model(name, given), None)
    folder = snapshot(hub_id, revision)
    if given is None and hub_id.startswith("apple/OpenELM-"):
        given = mirrored_tokenizer()
    return (
        Resolved(folder, given)
        if loadable(folder)
        else Resolved(converted(folder, given, hub_id), None)
    )


def is_published(name: str) -> bool:
    """Tell whether `name` has the form of the converter's catalog.

    Whether it names anything there, `convert.catalog.published` says.
    """
    return name.lower().startswith((f"{CORENET}:", f"{CORENET}-mlx:"))


def looks_like_path(name: str) -> bool:
    """Tell whether `name` can only be meant as a file or folder, so that the hub is not asked."""
    if (
        name.startswith((".", "/", "~"))
        or name.endswith("/")
        or "\\" in name
        or name.count("/") > 1
    ):
        return True
    return os.path.splitext(name)[1].lower() in FILE_SUFFIXES


def hub_id_of(name: str) -> str:
    """Return the hub id of a short name, or `name` where it is an id.

    Raises `HubError`, with suggestions, for any other name.
    """
    link = os.path.islink(os.path.expanduser(name))
    if link or looks_like_path(name):
        raise HubError(
            f"there is no file or folder {name}{' behind this link' if link else ''}; a model is {MODELS}"
        )
    hub_id = SHORT_NAMES.get(name.lower(), name)
    if (
        re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", hub_id, re.ASCII)
        and ".." not in hub_id
        and "--" not in hub_id
    ):
        return hub_id
    names = ["openelm-tiny", *SHORT_NAMES]
    close = difflib.get_close_matches(name.lower(), names, n=3)
    meant = f"did you mean {', '.join(close)}? A" if close else "a"
    raise HubError(f"unknown model {name!r}; {meant} model is {MODELS}")


def snapshot(hub_id: str, revision: str | None = None, patterns: list[str] = PATTERNS) -> Path:
    """Return the folder of a hub's model, fetched if need be. Raises `HubError` with the cause."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns))
    except Exception as error:  # the hub's client and what lies beneath it raise all kinds
        try:  # a cached copy that lacks only the licence will do
            known = [pattern for pattern in patterns if pattern not in LICENCE]
            folder = Path(
                snapshot_download(
                    hub_id, revision=revision, allow_patterns=known, local_files_only=True
                )
            )
        except Exception:
            raise HubError(explain(hub_id, revision, error)) from error
    if patterns is PATTERNS and not any(folder.glob("*.safetensors")):
        raise HubError(
            f"{hub_id} has no safetensors on the hub, or was fetched in part only; see its page, or "
            f"`openelm models remove {hub_id}` and fetch it again"
        )
    return folder


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
    raise HubError(
        f"no mirror gave the tokenizer ({'; '.join(problems)}); give one with --tokenizer"
    )


def hub_cache() -> Path:
    """Return the folder in which the hub's client keeps what it fetched."""
    from huggingface_hub import constants

    return Path(os.path.expanduser(constants.HF_HUB_CACHE))


def cached_repositories() -> dict[str, Path]:
    """Map hub ids to folders in the hub's cache, those of downloads that were cut included."""
    return {
        path.name.removeprefix("models--").replace("--", "/"): path
        for path in sorted(hub_cache().glob("models--*--*"))
        if path.is_dir()
    }


def remove_repository(hub_id: str) -> None:
    """Remove all revisions of a model from the hub's cache. Raises `OSError`."""
    from huggingface_hub import scan_cache_dir

    folder, found = cached_repositories()[hub_id], scan_cache_dir()
    alone = replace(
        found, repos=frozenset(repo for repo in found.repos if repo.repo_path == folder)
    )  # copies share revisions
    alone.delete_revisions(
        *(revision.commit_hash for repo in alone.repos for revision in repo.revisions)
    ).execute()
    if folder.exists():  # what a cut download left is no revision
        shutil.rmtree(folder)


def explain(hub_id: str, revision: str | None, error: BaseException) -> str:
    """Say in one line what failed and what to do, from the exception and those beneath it."""
    from huggingface_hub import constants, errors

    causes = list(chain(error))
    texts = [str(cause) for cause in causes]
    status, partial = status_of(error), getattr(errors, "IncompleteSnapshotError", ())
    if any(isinstance(cause, errors.HFValidationError) for cause in causes):
        return f"{hub_id} is no id of the hub (owner/name): {texts[-1].splitlines()[0].rstrip('.')[:200]}; check the spelling"
    if any(
        getattr(cause, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        for cause in causes
    ):
        return f"the disk is full while fetching {hub_id}; free some space and run the same command, it resumes"
    if any(
        isinstance(cause, UNWRITABLE) and cause.filename for cause in causes
    ):  # without: of a connection
        return f"{constants.HF_HUB_CACHE} cannot be written, so {hub_id} cannot be fetched; set HF_HUB_CACHE to another folder"
    if any(isinstance(cause, partial) for cause in causes):
        where = (
            "HF_HUB_OFFLINE is set"
            if constants.HF_HUB_OFFLINE
            else f"{constants.ENDPOINT} cannot be reached"
        )
        return (
            f"{hub_id} is on this disk in part only, and {where}; run the same command with a network and it fetches the "
            f"rest, or `openelm models remove {hub_id}`"
        )
    if constants.HF_HUB_OFFLINE:
        return (
            f"{hub_id} is not on this disk, and HF_HUB_OFFLINE is set; unset it to fetch the model"
        )
    if any(isinstance(cause, errors.GatedRepoError) for cause in causes):
        return (
            f"{hub_id} is gated (HTTP {status}): accept its terms at {constants.ENDPOINT}/{hub_id}, "
            "then log in: hf auth login"
        )
    if any(isinstance(cause, errors.RevisionNotFoundError) for cause in causes):
        return (
            f"{hub_id} has no revision {revision!r} on the hub (HTTP {status}); check the spelling"
        )
    if status in (401, 403):
        return f"{hub_id} is private, gated or does not exist (HTTP {status}); check the id or log in: hf auth login"
    if status == 404:
        return (
            f"{hub_id} was not found on the hub (HTTP 404); check the spelling{near_folder(hub_id)}"
        )
    if status == 429:
        return f"the hub limits how often it may be asked (HTTP 429); wait some minutes, or log in: hf auth login ({hub_id})"
    if status is not None:
        return f"{constants.ENDPOINT} answered with HTTP {status} for {hub_id}; try again later"
    if any("CERTIFICATE_VERIFY_FAILED" in text for text in texts):
        return f"the certificate of {constants.ENDPOINT} cannot be verified, so {hub_id} was not fetched; {CERTIFICATE_REMEDY}"
    endpoint = (
        f"{constants.ENDPOINT} (HF_ENDPOINT)"
        if os.environ.get("HF_ENDPOINT")
        else constants.ENDPOINT
    )
    reason = next((text.splitlines()[0] for text in reversed(texts) if text), "no answer")
    return (
        f"{hub_id} is not on this disk and {endpoint} cannot be reached ({reason[:200]}); check the network and any proxy, "
        f"then try again{near_folder(hub_id)}"
    )


def near_folder(hub_id: str) -> str:
    """Return a hint for a mistyped path such as models/270m, which reads like a hub id."""
    return (
        f"; there is no folder {hub_id} here either"
        if os.path.isdir(os.path.dirname(hub_id))
        else ""
    )


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
