"""Build the wheel and the source distribution, and check what they hold.

    python packaging/check_distributions.py dist

The source distribution has every file that git tracks and nothing else but its own metadata. The
wheel has the package once, without benchmarks/scripts, is the same byte for byte when it is built
again with the same SOURCE_DATE_EPOCH, umask and setuptools, and the same when it is built from the
source distribution. Run it in a clean checkout: a file that git ignores is packed like any other.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
METADATA = ("PKG-INFO", "setup.cfg", "openelm_mlx.egg-info/")
DATA = (".jinja", ".json", ".j2", ".md", ".model", ".safetensors", ".txt", "py.typed")


def output_of(*command: str) -> str:
    """Run a command in the repository; when it fails, leave with what it said."""
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)}:\n{done.stdout}{done.stderr}")
    return done.stdout


def build(source: Path, kind: str, out: Path) -> Path:
    """Build one distribution in an environment of its own, and return its path."""
    output_of(sys.executable, "-m", "build", f"--{kind}", "--outdir", str(out), str(source))
    (path,) = out.glob("*.tar.gz" if kind == "sdist" else "*.whl")
    return path


def unpacked(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


def check_sdist(root: Path, tracked: set[str]) -> None:
    packed = {
        str(path.relative_to(root))
        for path in root.rglob("*")
        if path.is_symlink() or path.is_file()
    }
    own = {path for path in packed if path.startswith(METADATA)}
    if packed - own != tracked:
        missing, extra = sorted(tracked - packed), sorted(packed - own - tracked)
        sys.exit(f"source distribution: MANIFEST.in leaves out {missing}, and packs {extra}")


def check_wheel(wheel: Path, tracked: set[str]) -> None:
    expected = set()
    for path in tracked:
        installed = path.startswith(("convert/", "benchmarks/"))
        name = f"openelm_mlx/{path}" if installed else path
        if path.endswith((".py", *DATA)) and name.startswith("openelm_mlx/"):
            expected.add(name)
    expected = {name for name in expected if not name.startswith("openelm_mlx/benchmarks/scripts/")}
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    data = [name for name in names if ".data/" in name]
    if [name.split(".data/data/")[1] for name in data] != ["share/man/man1/openelm.1"]:
        sys.exit(f"wheel: beside the package only the manual page is expected, not {data}")
    names = [name for name in names if name not in data]
    if len(names) != len(set(names)) or set(names) != expected:
        twice = sorted({name for name in names if names.count(name) > 1})
        missing, extra = sorted(expected - set(names)), sorted(set(names) - expected)
        sys.exit(f"wheel: lacks {missing}, has {extra} too many, has {twice} twice")


def check_index_page(wheel: Path) -> None:
    """Leave with the relative links of the index page: an index has no other files to link to."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        page = archive.read(name).decode()
    if relative := re.findall(r"\]\((?!https://)[^)]*\)", page):
        sys.exit(f"{name} has links that a package index cannot follow: {relative}")


def main(out: Path) -> None:
    os.environ.setdefault(
        "SOURCE_DATE_EPOCH", output_of("git", "log", "-1", "--format=%ct").strip()
    )
    tracked = set(output_of("git", "ls-files").splitlines())
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        sdist, wheel = build(ROOT, "sdist", out), build(ROOT, "wheel", out)
        again = build(ROOT, "wheel", scratch / "again")
        root = unpacked(sdist, scratch / "unpacked")
        check_sdist(root, tracked)
        check_wheel(wheel, tracked)
        check_index_page(wheel)
        for other, what in ((again, "again"), (build(root, "wheel", scratch / "sdist"), "from it")):
            if other.read_bytes() != wheel.read_bytes():
                sys.exit(f"wheel: built {what}, it has other bytes")
    output_of(sys.executable, "-m", "twine", "check", "--strict", str(sdist), str(wheel))
    print(f"{sdist.name}: {len(tracked)} files; {wheel.name}: the same bytes from clone and sdist")


if __name__ == "__main__":
    main(ROOT / sys.argv[1])
