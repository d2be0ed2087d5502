"""Let clang read the Metal source of a kernel; metal_syntax.h has Metal's words."""

from __future__ import annotations

import re
from pathlib import Path

from metal_source import BEFORE

HERE = Path(__file__).parent


def complaints(source: str) -> list[str]:
    """Return the errors and warnings in a source that `metal_source.sources` returns.

    Metal's attributes are left out, and a threadgroup variable is static, which it is not in Metal.
    """
    from clang.cindex import Diagnostic, Index

    text = re.sub(r"\[\[[^\]]*\]\]", "", source.removeprefix(BEFORE))
    text = re.sub(r"\bthreadgroup (?=\w+ \w+(?:\[[^;]*\])?;)", "static threadgroup ", text)
    files = [("kernel.cpp", f'#include "metal_syntax.h"\n{text}')]
    arguments = ["-std=c++17", f"-I{HERE}", "-fsyntax-only", "-Wall", "-Wno-unused-variable"]
    unit = Index.create().parse("kernel.cpp", args=arguments, unsaved_files=files)
    return [str(each) for each in unit.diagnostics if each.severity >= Diagnostic.Warning]
