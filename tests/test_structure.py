"""The rooms of the product: what may import what, without circles, and what each says of itself."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {
    "openelm_mlx": "openelm_mlx",
    "convert": "openelm_mlx.convert",
    "benchmarks": "openelm_mlx.benchmarks",
}

# A room may import from the rooms before it, and from itself. A room is the longest of these names
# that a module's name begins with.
ORDER = (
    "errors",
    "fields",
    "dtypes",
    "files",
    "drawing",
    "quantization",
    "settings",
    "mlx_wheels",
    "stopping",
    "device",
    "model",
    "graph",
    "engine",
    "chat",
    "evaluate",
    "convert.tokenizers",
    "convert.sources",
    "convert.opening",  # a source with its configuration and tokenizer
    "convert.quantize",
    "convert.targets",
    "convert",  # the pipeline, and what it is asked and says
    "convert.fetch",
    "finetune",
    "benchmarks",
    "benchmarks.hardware",
    "benchmarks.ledger",
    "benchmarks.results",
    "benchmarks.peers",
    "benchmarks.checks",
    "benchmarks.measure",
    "benchmarks.doctor",
    "benchmarks.scripts",
    "server",
    "cli",
    "__main__",
)
FORBIDDEN = {
    ("benchmarks.results", "benchmarks.ledger"),
    ("benchmarks.peers", "benchmarks.ledger"),
    *(("server", room) for room in ORDER if room.startswith(("convert", "benchmarks"))),
}
# what rooms of the converter share with its pipeline: no other file of `convert` is known to them
SHARED = {"convert.opening", "convert.options", "convert.record"}
# imports inside functions that go against the order
LAZY = {
    ("engine", "convert"),  # a source is made a folder that can be loaded
    ("dtypes", "device"),  # the type as MLX has it
}
# __init__.py of names that resolve on first use
ENTRANCES = {"openelm_mlx", "openelm_mlx.convert", "openelm_mlx.evaluate", "openelm_mlx.finetune"}


class Use(NamedTuple):
    """One import: where it stands, of which module, and whether it runs (or is for types only)."""

    module: str
    target: str
    line: int
    lazy: bool
    typing: bool


def find_modules() -> dict[str, Path]:
    modules = {}
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if path.is_symlink() or (folder == "openelm_mlx" and parts[0] in FOLDERS):
                continue
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            modules[".".join((package, *parts))] = path
    return modules


MODULES = find_modules()


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(MODULES[module].read_text(encoding="utf-8"))


def home_of(module: str, name: str) -> str:
    """Return the module that `from module import name` needs: an entrance only passes it on."""
    if f"{module}.{name}" in MODULES:
        return f"{module}.{name}"
    for node in ast.walk(tree(module)) if module in ENTRANCES else ():
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            return str(node.module)
    return module


Import = ast.Import | ast.ImportFrom


def imports(
    node: ast.AST, lazy: bool = False, typing: bool = False
) -> Iterator[tuple[Import, bool, bool]]:
    """Give the imports below a node, with what a `Use` says of them."""
    if isinstance(node, Import):
        yield node, lazy, typing
    lazy = lazy or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.expr):  # in which no statement stands
            guarded = isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
            yield from imports(child, lazy, typing or (guarded and child in node.body))


def uses_of(module: str) -> Iterator[Use]:
    for node, lazy, typing in imports(tree(module)):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif node.module in MODULES:
            targets = [home_of(node.module, alias.name) for alias in node.names]
        else:
            continue
        for target in targets:
            if target in MODULES and target != module:
                yield Use(module, target, node.lineno, lazy, typing)


@cache
def uses() -> list[Use]:
    return sorted({use for module in MODULES if module not in ENTRANCES for use in uses_of(module)})


def short(module: str) -> str:
    return module.removeprefix("openelm_mlx.")


def room_of(module: str) -> str | None:
    """Return the room that a module is in, None for the entrance to all of them."""
    name = short(module)
    rooms = [room for room in ORDER if name == room or name.startswith(f"{room}.")]
    return max(rooms, key=len, default=None)


def test_every_module_is_in_a_room():
    assert [module for module in MODULES if room_of(module) is None] == ["openelm_mlx"]


def permitted(use: Use) -> bool:
    """Tell whether `LAZY` has this import."""
    here, there = room_of(use.module), str(room_of(use.target)).split(".")[0]
    return (use.lazy or use.typing) and (here, there) in LAZY


def arrow(use: Use) -> str:
    return f"{short(use.module)} -> {short(use.target)}"


def test_arrows_between_rooms_point_one_way():
    wrong = set()
    for use in uses():
        here, there = room_of(use.module), room_of(use.target)
        if here is None or there is None or here == there or permitted(use):
            continue
        shared = here.startswith("convert.") and short(use.target) in SHARED
        backward = ORDER.index(there) > ORDER.index(here) and not shared
        if backward or (here, there) in FORBIDDEN:
            wrong.add(arrow(use))
    assert wrong == set()


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that each reach all others of their group (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(module: str) -> None:
        index[module] = low[module] = len(index)
        stack.append(module)
        for target in edges[module]:
            if target not in index:
                visit(target)
            if target in stack:
                low[module] = min(low[module], low[target])
        if low[module] == index[module]:
            group = stack[stack.index(module) :]
            del stack[stack.index(module) :]
            if len(group) > 1:
                found.append(sorted(group))

    for module in edges:
        if module not in index:
            visit(module)
    return found


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_no_imports_in_circles():
    """Imports inside functions count, but for those of `LAZY`."""
    edges: dict[str, set[str]] = {module: set() for module in MODULES}
    for use in uses():
        of_types = use.typing and room_of(use.module) == room_of(use.target)
        if not permitted(use) and not of_types:
            edges[use.module].add(use.target)
    assert circles(edges) == []


PACKAGES = [path for path in MODULES.values() if path.name == "__init__.py"]


@pytest.mark.parametrize("path", PACKAGES, ids=lambda path: str(path.parent.relative_to(ROOT)))
def test_a_room_says_what_lives_there_and_what_may_not(path: Path):
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    lines = [line for line in text.splitlines() if line.strip()]
    assert 2 <= len(lines) <= 12


MLX = {ROOT / "openelm_mlx" / "device.py"}


@pytest.mark.parametrize("module", MODULES)
def test_mlx_is_imported_through_the_device_only(module: str):
    names = [
        name
        for node, _, _ in imports(tree(module))
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [str(node.module)]
        )
    ]
    found = [name for name in names if name.split(".")[0] == "mlx"]
    assert bool(found) == (MODULES[module] in MLX)


def test_files_are_few_and_short():
    """A file is one idea and fits in one's head; a room has few of them."""
    folders = ("openelm_mlx", "convert", "benchmarks", "tests")
    files = [
        path
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".j2") and not path.is_symlink()
    ]
    lengths = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert len([path for path in files if ROOT / "tests" not in path.parents]) <= 236
    assert not [path for path, length in lengths.items() if length > 350]


def test_no_two_files_of_tests_have_one_name():
    """Without packages, pytest imports them by their names alone."""
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(names) == sorted(set(names))
