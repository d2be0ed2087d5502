"""The options of `openelm serve`. Nothing here needs the packages of the extra `server`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path

from openelm_mlx.errors import OptionError
from openelm_mlx.fields import check_fields, explained, option, shown

NAME = re.compile(r"[a-z0-9_]([a-z0-9_.-]*[a-z0-9_])?", re.IGNORECASE | re.ASCII)
# scheme://host[:port], as a browser sends it
ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://(\[[0-9a-f:.]+\]|[a-z0-9_.-]+)(:\d+)?", re.ASCII)


@explained()
@dataclass(frozen=True)
class ServerOptions:
    """Options that decide where the server listens, who may ask, and how much it takes on."""

    host: str = option(
        "127.0.0.1", "listen on this address; any but this machine's own asks for a key"
    )
    port: int = option(8080, "listen on this port; 0 lets the system choose one", 0, 65535)
    api_key: tuple[str, ...] = option((), "answer only requests with this key", metavar="KEY")
    api_key_file: Path | None = option(
        None, "answer only requests with a key of this file, one a line"
    )
    allowed_host: tuple[str, ...] = option(
        (), "answer requests to this name too, beside the address and localhost", metavar="NAME"
    )
    cors_origin: tuple[str, ...] = option(
        (), "let pages of this origin ask, as in https://example.org", metavar="ORIGIN"
    )
    slots: int = option(16, "requests that run together, for each model", 1, 1024)
    queue: int = option(256, "requests that wait at most, for each model; more get 429", 1)
    cache_mb: int = option(512, "megabytes for prompts that later requests share; 0 keeps none", 0)
    memory_gb: float | None = option(
        None,
        "gigabytes for weights and caches of all models; unset is what the device recommends",
        0.001,
    )
    adapters: tuple[str, ...] = option(
        (),
        "serve this LoRA or DoRA adapter too, by the name MODEL:NAME; NAME is the folder's unless "
        "given; with several models as MODEL:NAME=FOLDER",
        flag="--adapter",
        metavar="[NAME=]FOLDER",
    )
    draft_model: str | None = option(
        None, "a smaller model that drafts tokens; answers stay the same", metavar="MODEL"
    )
    prompt_lookup: int = option(
        0, "draft what followed these N tokens before, unless a request says otherwise", 0, 16
    )
    max_body: int = option(4_194_304, "bytes of a request's body at most", 1024)
    header_seconds: float = option(10.0, "seconds for a request's head to arrive", 0.1)
    body_seconds: float = option(30.0, "seconds for a request's body to arrive", 0.1)
    request_seconds: float = option(600.0, "seconds that a request may wait and run", 0.1)
    keep_alive: float = option(
        10.0, "seconds between comments in a stream while there is no token", 0.1
    )
    grace: float = option(30.0, "seconds for running requests to end after SIGTERM", 0.0)
    log_text: bool = option(False, "write prompts and answers into the log")

    def __post_init__(self) -> None:
        check_fields(self)
        if not all(map(fits_key, self.api_key)):
            raise OptionError("an api_key has a blank or a character outside ASCII; take another")
        for name in self.allowed_host:
            if not (NAME.fullmatch(name) or is_address(name)):
                what = f"allowed_host is {shown(name)}; allowed is a name as in a URL"
                raise OptionError(f"{what}, without scheme and port")
        for origin in self.cors_origin:
            if not ORIGIN.fullmatch(origin):
                what = f"cors_origin is {shown(origin)}; allowed is an exact origin in lower case"
                raise OptionError(f"{what}, as in https://example.org or http://localhost:3000")
        if not self.host:
            raise OptionError("host is ''; allowed is a name or an address, as in 127.0.0.1")
        if not self.keyed and not is_own(self.host):
            what = f"host is {shown(self.host)}, which other machines can reach"
            raise OptionError(f"{what}; give --api-key-file or --api-key too")

    @property
    def keyed(self) -> bool:
        """True if a request needs a key."""
        return bool(self.api_key) or self.api_key_file is not None


def fits_key(text: str) -> bool:
    """Return whether a text can be a key: it goes into a header as it is."""
    return text.isascii() and text.isprintable() and " " not in text


def is_address(text: str) -> bool:
    """Return whether a text is an address in digits: no name server can make it another one."""
    try:
        return bool(ip_address(text))
    except ValueError:
        return False


def is_own(host: str) -> bool:
    """Return whether only programs on this machine can reach this host."""
    return host.lower() == "localhost" or (is_address(host) and ip_address(host).is_loopback)
