"""A system OpenBLAS in place of the reference BLAS that MLX's Linux wheel links."""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import OptionError

DEFAULT = "off"  # until 100 exits under load have been seen to be clean
NAMES = ("libopenblas.so.0", "libopenblas.so")


@dataclass(frozen=True)
class BlasChoice:
    path: str | None
    reason: str


def choose_blas(environ: Mapping[str, str], platform: str, candidates: tuple[str, ...]) -> BlasChoice:
    """What OPENELM_BLAS asks for: auto (the first candidate), off, or a path."""
    wish = environ.get("OPENELM_BLAS") or DEFAULT
    if not platform.startswith("linux"):
        return BlasChoice(None, "only Linux needs another BLAS")
    if wish == "off":
        return BlasChoice(None, "OPENELM_BLAS is off")
    if wish != "auto":
        return BlasChoice(wish, "named by OPENELM_BLAS")
    if not candidates:
        return BlasChoice(None, "no OpenBLAS found; install libopenblas0-pthread")
    return BlasChoice(candidates[0], "found on this system")


def load_blas(environ: Mapping[str, str] | None = None) -> BlasChoice:
    """Load the chosen library for all to see. Has no effect once mlx.core is imported."""
    environ = os.environ if environ is None else environ
    auto = (environ.get("OPENELM_BLAS") or DEFAULT) == "auto"
    found = (ctypes.util.find_library("openblas"), *NAMES) if auto else ()
    choice = choose_blas(environ, sys.platform, tuple(dict.fromkeys(n for n in found if n)))
    if choice.path is None:
        return choice
    if "mlx.core" in sys.modules:
        return BlasChoice(None, "mlx was imported first, too late for another BLAS")
    names = (choice.path, *NAMES) if auto else (choice.path,)
    for name in dict.fromkeys(names):
        try:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
            return BlasChoice(name, choice.reason)
        except OSError as error:
            problem = error
    if not auto:
        raise OptionError(f"OPENELM_BLAS={choice.path} cannot be loaded ({problem}); "
                          "give auto, off, or the path of a libopenblas.so")
    return BlasChoice(None, "no OpenBLAS found; install libopenblas0-pthread")
