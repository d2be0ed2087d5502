"""What pyproject.toml cannot describe: the package's two links, and the page of a package index.

`openelm_mlx/convert` and `openelm_mlx/benchmarks` are symbolic links to the folders beside the
package.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from setuptools import setup
from setuptools.command.sdist import sdist

ROOT = Path(__file__).parent
LINKED = ("convert", "benchmarks")


class SourceDistribution(sdist):
    """Pack the linked folders once, where the clone has them, and the links themselves."""

    def make_release_tree(self, base_dir: str, files: list[str]) -> None:
        once = {re.sub(rf"^openelm_mlx/({'|'.join(LINKED)})/", r"\1/", file) for file in files}
        super().make_release_tree(base_dir, sorted(once))
        for name in LINKED:
            Path(base_dir, "openelm_mlx", name).symlink_to(f"../{name}")


def index_page() -> str:
    """Return README without its relative links: a package index has no files to lead to."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.sub(r"\[([^]]+)\]\((?!\w+://)[^)]+\)", r"\1", text)


links = [f"openelm_mlx/{name}" for name in LINKED]
if not all(Path(ROOT, link).is_dir() for link in links):
    sys.exit(
        f"{' and '.join(links)} must be symbolic links, but git made text files of them here: run "
        f"`git config core.symlinks true && git checkout -- {' '.join(links)}`"
    )
setup(
    cmdclass={"sdist": SourceDistribution},
    long_description=index_page(),
    long_description_content_type="text/markdown",
)
