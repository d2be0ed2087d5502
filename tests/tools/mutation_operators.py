"""The mutations that mutation.py draws from: cosmic-ray's that can pass unseen, and one more."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator, operator_names
from cosmic_ray.work_item import MutationSpec
from parso.python.tree import Keyword

KINDS = (
    {"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod"},
    {"RShift", "LShift", "BitOr", "BitAnd", "BitXor"},
)  # of binary operators, within which one stands for another: the rest only raise TypeError


class RemoveStatement(Operator):
    """Leaves out `raise`, `del`, calls whose result is dropped, and assignments but to names."""

    def mutation_positions(self, node: Any) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
        if node.type == "simple_stmt" and self.removable(node.children[0]):
            yield node.children[0].start_pos, node.children[0].end_pos

    def removable(self, statement: Any) -> bool:
        if statement.type != "expr_stmt":
            return statement.type in ("atom_expr", "await_expr", "raise_stmt", "del_stmt")
        if statement.children[1].type == "annassign":
            return False
        return statement.children[1].value != "=" or statement.children[0].type == "atom_expr"

    def mutate(self, node: Any, index: int) -> Any:
        old = node.children[0]
        node.children[0] = Keyword("pass", old.start_pos, old.get_first_leaf().prefix)
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


@cache
def operators() -> dict[str, Operator]:
    """Return the mutations to choose from, by name."""
    found: dict[str, Operator] = {"RemoveStatement": RemoveStatement()}
    for name in operator_names():
        binary = re.fullmatch(r"core/ReplaceBinaryOperator_(\w+)_(\w+)", name)
        if binary and not any(set(binary.groups()) <= kind for kind in KINDS):
            continue
        if not get_operator(name).arguments():
            found[name] = get_operator(name)()
    return found


def mutated(source: str, mutant: MutationSpec) -> str:
    """Return the source with this mutation."""
    return mutate_code(source, operators()[mutant.operator_name], mutant.occurrence)


def mutations(file: str, source: str) -> dict[int, list[MutationSpec]]:
    """Return every mutation of a file, by line."""
    found: dict[int, list[MutationSpec]] = defaultdict(list)
    nodes = [node for node in ast_nodes(get_ast(source)) if not is_marker(node)]
    for name, operator in operators().items():
        positions = [position for node in nodes for position in operator.mutation_positions(node)]
        for occurrence, (start, end) in enumerate(positions):
            found[start[0]].append(MutationSpec(Path(file), name, occurrence, start, end))
    return found


def is_marker(node: Any) -> bool:
    """Tell the * and / of a parameter list, which cosmic-ray takes for operations."""
    return node.type == "operator" and node.parent.type in ("parameters", "lambdef")


def behaviour(source: str) -> str | None:
    """Return the syntax tree without annotations; None for what is not Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if hasattr(node, field):
                setattr(node, field, None)
    return ast.dump(tree)
