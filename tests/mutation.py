"""A mutation campaign: of so many small faults put into lines that the tests execute, how many does a test notice?

    pip install -e '.[dev,mutation]'
    python tests/mutation.py --seed 11 --count 100

All of it happens in copies of the tree below the session's folder; the working tree is only read. Each test file runs
once under coverage, to see which test executes which line. Then executed lines are drawn evenly over openelm_mlx,
convert and benchmarks, and for each line one of the mutations that cosmic-ray's operators or `RemoveStatement` allow
there. A mutant meets the tests that execute its line, fastest first, then others of its file and of the files that
import it, for at most SECONDS. It is killed when a test fails that passes without the mutation, or when time runs out.

A call ends after `--minutes` with status 1, and the same command goes on from there. session.sqlite is cosmic-ray's own
format: `cr-report --show-diff FILE` and `cr-html` read it. Annotations are not mutated. A mutant runs with a home of its
own, but with your rights.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import json
import os
import random
import re
import secrets
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import parso.python.tree
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from cosmic_ray.operators.operator import Operator
from cosmic_ray.plugins import get_operator, operator_names
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkItem, WorkResult
from coverage import CoverageData

ROOT = Path(__file__).parents[1]
ROOMS = ("openelm_mlx", "convert", "benchmarks")
SECONDS = 60.0  # of tests for one mutant, by their times under coverage
KINDS = ({"Add", "Sub", "Mul", "Div", "FloorDiv", "Mod"}, {"RShift", "LShift", "BitOr", "BitAnd", "BitXor"})
COVERAGE = """[run]
data_file = ${MUTATION_FOLDER}/data
parallel = true
sigterm = true
context = ${PYTEST_CURRENT_TEST-}
include = TREE/*
disable_warnings = no-data-collected
"""  # a child of a test has pytest's name of the test as its context; in pytest itself mutation_contexts switches it


class OutOfTime(Exception):
    """The minutes of this call are over."""


class RemoveStatement(Operator):
    """Leaves out calls whose result is dropped, augmented assignments, those to attributes and items, and `raise`."""

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
        node.children[0] = parso.python.tree.Keyword("pass", old.start_pos, old.get_first_leaf().prefix)
        return node

    @classmethod
    def examples(cls) -> tuple[()]:
        return ()


@cache
def operators() -> dict[str, Operator]:
    """Every mutation to choose from; of binary operators only the exchanges that do not merely raise TypeError."""
    found: dict[str, Operator] = {"RemoveStatement": RemoveStatement()}
    for name in operator_names():
        binary = re.fullmatch(r"core/ReplaceBinaryOperator_(\w+)_(\w+)", name)
        if not get_operator(name).arguments() and not (binary and not any(set(binary.groups()) <= kind for kind in KINDS)):
            found[name] = get_operator(name)()
    return found


@dataclass
class Session:
    """A campaign in a folder: the copy of the tree, who executes what, the mutants and what became of them."""

    folder: Path
    deadline: float

    @property
    def tree(self) -> Path:
        return self.folder / "tree"

    def check_time(self) -> None:
        if time.monotonic() > self.deadline:
            raise OutOfTime

    def copy(self) -> None:
        """Copy what git tracks or would add, once."""
        if self.tree.exists():
            return
        part = self.folder / "tree.part"
        shutil.rmtree(part, ignore_errors=True)
        names = subprocess.run(["git", "ls-files", "-coz", "--exclude-standard"], cwd=ROOT, capture_output=True, check=True)
        for name in filter(None, names.stdout.decode().split("\0")):
            if (ROOT / name).is_file():
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, part / name)
        part.rename(self.tree)

    def run_pytest(
        self, tree: Path, *arguments: str, seconds: float | None = None, **environment: str
    ) -> tuple[int | None, str]:
        """Exit status and output of pytest in a tree; the status is None where the seconds did not suffice."""
        home = self.folder / "home"
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        settings = {"HOME": str(home), "TMPDIR": str(home / "tmp"), "PYTHONDONTWRITEBYTECODE": "1",
                    "PYTHONPATH": f"{tree}{os.pathsep}{tree / 'tests'}"}  # fmt: skip
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-p", "no:cacheprovider", "-q", "--tb=no", *arguments]
        with open(self.folder / "output.txt", "w+", errors="replace") as output:
            run = subprocess.Popen(command, cwd=tree, env=os.environ | settings | environment, stdout=output,
                                   stderr=subprocess.STDOUT, start_new_session=True)  # fmt: skip
            try:
                status: int | None = run.wait(seconds)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(run.pid, signal.SIGKILL)  # with what it has started
                run.wait()
            output.seek(0)
            return status, output.read()

    def cover(self) -> None:
        """Run every test file once under coverage."""
        settings = self.folder / "coveragerc"
        settings.write_text(COVERAGE.replace("TREE", str(self.tree)))
        paths = sorted(self.tree.glob("tests/test_*.py"))
        for number, path in enumerate(paths, start=1):
            folder = self.folder / "covered" / path.stem
            if (folder / "tests.json").exists():
                continue
            self.check_time()
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            _, output = self.run_pytest(self.tree, "-p", "mutation_contexts", f"tests/{path.name}", MUTATION_FOLDER=str(folder),
                                        COVERAGE_PROCESS_START=str(settings))  # fmt: skip
            if not (folder / "tests.part").exists():
                raise SystemExit(f"{path.name} did not run: {output[-2000:]}")
            (folder / "tests.part").rename(folder / "tests.json")
            print(f"covered {number} of {len(paths)}: {path.name}", flush=True)

    @cached_property
    def tests(self) -> dict[str, dict[str, Any]]:
        """The tests that pass, each with its seconds and fixtures."""
        found = {}
        for path in self.folder.glob("covered/*/tests.json"):
            found |= {name: test for name, test in json.loads(path.read_text()).items() if test["passed"]}
        return found

    @cached_property
    def lines(self) -> dict[str, dict[int, set[str]]]:
        """The tests that execute each line of each file; lines that run on import only have none."""
        found: dict[str, dict[int, set[str]]] = {}
        for path in sorted(self.folder.glob("covered/*/data*")):
            here = {name: test for name, test in self.tests.items() if name.startswith(f"tests/{path.parent.name}.py::")}
            data = CoverageData(str(path))
            data.read()
            for file in data.measured_files():
                name = str(Path(file).relative_to(self.tree))
                if name.split("/")[0] not in ROOMS:
                    continue
                lines = found.setdefault(name, defaultdict(set))
                for line, contexts in data.contexts_by_lineno(file).items():
                    for context in contexts:
                        kind, _, fixture = context.partition(" ")
                        if kind == "fixture":
                            lines[line] |= {test for test, facts in here.items() if fixture in facts["fixtures"]}
                        else:
                            lines[line] |= {re.sub(r" \((setup|call|teardown)\)$", "", context)} & here.keys()
        return dict(sorted(found.items()))

    def judges(self, mutant: MutationSpec) -> list[str]:
        """The tests that a mutant meets, in order."""
        file = str(mutant.module_path)
        module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        module = module if module.startswith("openelm_mlx") else f"openelm_mlx.{module}"
        importers = [name for name in self.lines if re.search(rf"\b{re.escape(module)}\b", (self.tree / name).read_text())]
        chosen: dict[str, float] = {}
        of_files = [set().union(*self.lines[name].values()) for name in (file, *importers)]
        for group in (self.lines[file][mutant.start_pos[0]], *of_files):
            for test in sorted(group, key=lambda name: self.tests[name]["seconds"]):
                if not chosen or sum(chosen.values()) + self.tests[test]["seconds"] < SECONDS:
                    chosen.setdefault(test, self.tests[test]["seconds"])
        return list(chosen)

    def judge(self, mutant: MutationSpec, sound: set[str]) -> WorkResult:
        """Whether a test notices. `sound` holds tests that are known to pass alone in the unchanged tree."""
        file, tests = str(mutant.module_path), self.judges(mutant)
        original = (self.tree / file).read_text()
        changed = mutate_code(original, operators()[mutant.operator_name], mutant.occurrence)
        diff = "\n".join(difflib.unified_diff(original.splitlines(), changed.splitlines(), file, file, lineterm=""))
        tree = self.folder / "mutant"
        shutil.rmtree(tree, ignore_errors=True)
        shutil.copytree(self.tree, tree)
        (tree / file).write_text(changed)
        while tests:
            seconds = 60 + 5 * sum(self.tests[test]["seconds"] for test in tests)
            status, output = self.run_pytest(tree, "-x", *tests, seconds=seconds)
            if status is None:
                return WorkResult(WorkerOutcome.NORMAL, "timeout", TestOutcome.KILLED, diff)
            if status == 0:
                break
            failed = re.search(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - .*)?$", output, re.MULTILINE)
            test = failed[1] if failed else None  # no test at all: what they import does not work
            if test in tests and test not in sound and self.run_pytest(self.tree, test)[0] != 0:
                tests.remove(test)
                continue
            sound |= {test} - {None}
            return WorkResult(WorkerOutcome.NORMAL, test or output[-500:], TestOutcome.KILLED, diff)
        return WorkResult(WorkerOutcome.NORMAL, f"{len(tests)} tests pass", TestOutcome.SURVIVED, diff)


def mutations(file: str, source: str) -> dict[int, list[MutationSpec]]:
    """Every mutation of a file, by line."""
    found: dict[int, list[MutationSpec]] = defaultdict(list)
    nodes = list(ast_nodes(get_ast(source)))
    for name, operator in operators().items():
        positions = [position for node in nodes for position in operator.mutation_positions(node)]
        for occurrence, (start, end) in enumerate(positions):
            found[start[0]].append(MutationSpec(Path(file), name, occurrence, start, end))
    return found


def behaviour(source: str) -> str | None:
    """The syntax tree without annotations; None for what is no Python."""
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            if hasattr(node, field):
                setattr(node, field, None)
    return ast.dump(tree)


def draw(session: Session, generator: random.Random, count: int) -> Iterator[MutationSpec]:
    """Executed lines without repetition, and of each one position and one mutation there."""
    places = [(file, line) for file, lines in session.lines.items() for line in sorted(lines)]
    share = Counter(file.split("/")[0] for file, _ in places)
    print(f"executed lines: {dict(share)}", flush=True)
    generator.shuffle(places)
    known: dict[str, dict[int, list[MutationSpec]]] = {}
    for file, line in places:
        source = (session.tree / file).read_text()
        if file not in known:
            known[file] = mutations(file, source)
        here = known[file].get(line, [])
        while here:
            start = generator.choice(sorted({mutant.start_pos for mutant in here}))
            mutant = generator.choice([mutant for mutant in here if mutant.start_pos == start])
            changed = behaviour(mutate_code(source, operators()[mutant.operator_name], mutant.occurrence))
            if changed is not None and changed != behaviour(source):
                yield mutant
                count -= 1
                break
            here = [other for other in here if other != mutant]
        if not count:
            return


def report(database: WorkDB) -> None:
    """The survivors as diffs, then the sum."""
    fates: Counter[tuple[str, str]] = Counter()
    for item, result in sorted(database.completed_work_items, key=lambda pair: pair[0].job_id):
        fate = "timeout" if result.output == "timeout" else result.test_outcome.value
        fates[str(item.mutations[0].module_path).split("/")[0], fate] += 1
        if fate == "survived":
            print(f"\nmutant {item.job_id} survived, {result.output}:\n{result.diff}")
    for room in ROOMS:
        print(f"{room}: " + ", ".join(f"{fates[room, fate]} {fate}" for fate in ("killed", "timeout", "survived")))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, help="of the lines drawn (default: a new one, printed)")
    parser.add_argument("--count", type=int, default=100, help="mutants (default: 100)")
    parser.add_argument("--session", type=Path, default=ROOT / "build" / "mutation", metavar="FOLDER",
                        help="what to go on with, or where to begin (default: build/mutation)")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=20.0, help="after which this call ends (default: 20)")
    args = parser.parse_args()
    folder = args.session.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    session = Session(folder, time.monotonic() + 60 * args.minutes)
    seed_file, started = folder / "seed", folder / "session.sqlite"
    if not seed_file.exists():
        seed_file.write_text(str(secrets.randbelow(10**6) if args.seed is None else args.seed))
    seed = int(seed_file.read_text())
    if args.seed not in (None, seed):
        parser.error(f"the session in {args.session} has seed {seed}; give another --session for another seed")
    print(f"seed {seed}, session {folder}", flush=True)
    with use_db(str(started)) as database:
        try:
            session.copy()
            session.cover()
            if not database.num_work_items:
                drawn = enumerate(draw(session, random.Random(seed), args.count), start=1)
                database.add_work_items([WorkItem.single(f"{number:03}", mutant) for number, mutant in drawn])
            sound: set[str] = set()
            for item in sorted(database.pending_work_items, key=lambda item: item.job_id):
                session.check_time()
                (mutant,) = item.mutations
                result = session.judge(mutant, sound)
                database.set_result(item.job_id, result)
                place = f"{mutant.module_path}:{mutant.start_pos[0]}"
                print(f"{item.job_id} {result.test_outcome.value}: {place} {mutant.operator_name}: {result.output}", flush=True)
        except OutOfTime:
            print(f"{args.minutes:g} minutes are over; the same command goes on from here")
            return 1
        finally:
            report(database)
    return 0


if __name__ == "__main__":
    sys.exit(main())
