"""Writes `openelm.1`, the manual page, from the parsers of the command line.

    python packaging/manual.py      needs argparse-manpage, which the extra `dev` installs

A test compares the committed page with the parsers, so `man openelm` and `--help` say the same.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from argparse_manpage.manpage import Manpage

from openelm_mlx import __version__
from openelm_mlx.cli import build_parser

# paragraphs whose lines man is not to fill: usage, and examples
LAID_OUT = r"^(?:usage: .*|examples:)(?:\n +.*)*"
PAGE = Path(__file__).with_name("openelm.1")


def manual() -> str:
    """Return the page in roff. It does not depend on the date or on the width of the terminal."""
    os.environ["COLUMNS"] = "74"  # of a terminal of 80, less the indentation of man
    page = Manpage(build_parser(), {"date": __version__, "project_name": "openelm-mlx"})
    page.description = "run, convert, evaluate and measure Apple's OpenELM language models"
    page.manual = "User Commands"
    return re.sub(LAID_OUT, r".nf\n\g<0>\n.fi", str(page), flags=re.MULTILINE)


if __name__ == "__main__":
    PAGE.write_text(manual(), encoding="utf-8")
