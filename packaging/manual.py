"""Writes `openelm.1`, the manual page, from the parsers of the command line.

    python packaging/manual.py      needs argparse-manpage, which the extra `dev` installs

A test compares the committed page with the parsers, so `man openelm` and `--help` say the same.
"""

from __future__ import annotations

import os
from pathlib import Path

from argparse_manpage.manpage import Manpage

from openelm_mlx import __version__
from openelm_mlx.cli import build_parser

PAGE = Path(__file__).with_name("openelm.1")


def manual() -> str:
    """Return the page in roff. It does not depend on the date or on the width of the terminal."""
    os.environ["COLUMNS"] = "80"
    page = Manpage(build_parser(), {"date": __version__, "project_name": "openelm-mlx"})
    page.description = "run, convert, evaluate and measure Apple's OpenELM language models"
    page.manual = "User Commands"
    return str(page)


if __name__ == "__main__":
    PAGE.write_text(manual(), encoding="utf-8")
