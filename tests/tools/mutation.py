"""A mutation campaign: of many small faults in lines that the tests execute, how many are noticed?

    pip install -e '.[dev,mutation]'
    python tests/tools/mutation.py --seed 11 --count 100

All of it happens in copies of the tree below the session's folder; the working tree is only read.
Each test file runs once under coverage, to see which test executes which line. Then executed lines
are drawn evenly over openelm_mlx, convert and benchmarks, and for each line one of the mutations
that cosmic-ray's operators or `RemoveStatement` allow there. A mutant meets the tests that execute
its line, fastest first, then others of its file and of the files that import it, for at most
SECONDS. It is killed when a test fails that passes without the mutation, or when time runs out.

A call ends after `--minutes` with status 1, and the same command goes on from there. The result,
session.sqlite, has cosmic-ray's own format, which `cr-report --show-diff` and `cr-html` read.
Annotations are not mutated. A mutant runs with a home of its own, but with your rights.
"""

from __future__ import annotations

import argparse
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
from functools import cached_property
from pathlib import Path
from typing import Any

from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkItem, WorkResult
from coverage import CoverageData
from mutation_operators import behaviour, mutated, mutations

ROOT = Path(__file__).parents[2]
ROOMS = ("openelm_mlx", "convert", "benchmarks")
SECONDS = 60.0  # of tests for one mutant, by their times under coverage
COVERAGE = """[run]
data_file = ${MUTATION_FOLDER}/data
parallel = true
sigterm = true
context = ${PYTEST_CURRENT_TEST-}
include = TREE/*
disable_warnings = no-data-collected
"""  # pytest itself has its contexts from mutation_contexts; a child process has the test's name


class OutOfTime(Exception):
    """The minutes of this call are over."""


@dataclass
class Session:
    """A campaign in a folder: the copy of the tree, who executes what, and the mutant at work."""

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
        git = ["git", "ls-files", "-coz", "--exclude-standard"]
        names = subprocess.run(git, cwd=ROOT, capture_output=True, check=True).stdout.decode()
        for name in filter(None, names.split("\0")):
            if (ROOT / name).is_file() or (ROOT / name).is_symlink():
                (part / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, part / name, follow_symlinks=False)
        part.rename(self.tree)

    def run_pytest(
        self, tree: Path, *arguments: str, seconds: float | None = None, **environment: str
    ) -> tuple[int | None, str]:
        """Return pytest's status and output in a tree; None where the seconds did not suffice."""
        home = self.folder / "home"
        (home / "tmp").mkdir(parents=True, exist_ok=True)
        settings = {"HOME": str(home), "TMPDIR": str(home / "tmp"), "PYTHONDONTWRITEBYTECODE": "1"}
        settings["PYTHONPATH"] = f"{tree}{os.pathsep}{tree / 'tests' / 'tools'}"
        environment = os.environ | settings | environment
        options = ["-o", "addopts=", "-p", "no:cacheprovider", "-q", "--tb=no"]
        command = [sys.executable, "-m", "pytest", *options, *arguments]
        with open(self.folder / "output.txt", "w+", errors="replace") as output:
            run = subprocess.Popen(
                command,
                cwd=tree,
                env=environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
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
        paths = sorted(self.tree.glob("tests/**/test_*.py"))
        for number, path in enumerate(paths, start=1):
            name = str(path.relative_to(self.tree))
            folder = self.folder / "covered" / name.replace("/", ":")
            if (folder / "tests.json").exists():
                continue
            self.check_time()
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            _, output = self.run_pytest(
                self.tree,
                "-p",
                "mutation_contexts",
                name,
                MUTATION_FOLDER=str(folder),
                COVERAGE_PROCESS_START=str(settings),
            )
            if not (folder / "tests.part").exists():
                raise SystemExit(f"{name} did not run: {output[-2000:]}")
            (folder / "tests.part").rename(folder / "tests.json")
            print(f"covered {number} of {len(paths)}: {name}", flush=True)

    @cached_property
    def tests(self) -> dict[str, dict[str, Any]]:
        """Return the tests that pass, each with its seconds and fixtures."""
        found: dict[str, Any] = {}
        for path in self.folder.glob("covered/*/tests.json"):
            tests = json.loads(path.read_text()).items()
            found |= {name: test for name, test in tests if test["passed"]}
        return found

    @cached_property
    def lines(self) -> dict[str, dict[int, set[str]]]:
        """Return the tests that execute each line of each file: none if it runs on import only."""
        found: dict[str, dict[int, set[str]]] = {}
        for path in sorted(self.folder.glob("covered/*/data*")):
            here = self.by_context(path.parent.name.replace(":", "/"))
            data = CoverageData(str(path))
            data.read()
            for file in data.measured_files():
                name = str(Path(file).relative_to(self.tree))
                if name.split("/")[0] not in ROOMS:
                    continue
                lines = found.setdefault(name, defaultdict(set))
                for line, contexts in data.contexts_by_lineno(file).items():
                    lines[line].update(*(here.get(context, ()) for context in contexts))
        return dict(sorted(found.items()))

    def by_context(self, file: str) -> dict[str, set[str]]:
        """Return the tests of a test file for each context that coverage may have recorded."""
        found: dict[str, set[str]] = defaultdict(set)
        for name, test in self.tests.items():
            if name.startswith(f"{file}::"):
                parts = [f"{name} ({part})" for part in ("setup", "call", "teardown")]
                for context in (name, *parts, *(f"fixture {used}" for used in test["fixtures"])):
                    found[context].add(name)
        return found

    def judges(self, mutant: MutationSpec) -> list[str]:
        """Return the tests that a mutant meets, in order."""
        file = str(mutant.module_path)
        module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        module = "openelm_mlx." + module.removeprefix("openelm_mlx.")
        named = re.compile(rf"\b{re.escape(module)}\b")
        importers = [name for name in self.lines if named.search((self.tree / name).read_text())]
        chosen: dict[str, float] = {}
        of_files = [set().union(*self.lines[name].values()) for name in (file, *importers)]
        for group in (self.lines[file][mutant.start_pos[0]], *of_files):
            for test in sorted(group, key=lambda name: self.tests[name]["seconds"]):
                if not chosen or sum(chosen.values()) + self.tests[test]["seconds"] < SECONDS:
                    chosen.setdefault(test, self.tests[test]["seconds"])
        return list(chosen)

    def judge(self, mutant: MutationSpec, sound: set[str]) -> WorkResult:
        """Let tests judge a mutant. `sound` gets those that are known to pass without mutations."""
        file, tests = str(mutant.module_path), self.judges(mutant)
        original = (self.tree / file).read_text()
        changed = mutated(original, mutant)
        texts = original.splitlines(), changed.splitlines()
        diff = "\n".join(difflib.unified_diff(*texts, file, file, lineterm=""))
        tree = self.folder / "mutant"
        shutil.rmtree(tree, ignore_errors=True)
        shutil.copytree(self.tree, tree, symlinks=True)
        (tree / file).write_text(changed)
        while tests:
            seconds = 30 + 2 * sum(self.tests[test]["seconds"] for test in tests)
            status, output = self.run_pytest(tree, "-x", *tests, seconds=seconds)
            if status is None:
                return WorkResult(WorkerOutcome.NORMAL, "timeout", TestOutcome.KILLED, diff)
            if status == 0:
                break
            failed = re.search(r"^(?:FAILED|ERROR) (\S+::.+?)(?: - .*)?$", output, re.MULTILINE)
            test = failed[1] if failed else output[-500:]  # no test: one cannot be imported
            if test in tests and test not in sound and self.run_pytest(self.tree, test)[0] != 0:
                tests.remove(test)
                continue
            sound.add(test)
            return WorkResult(WorkerOutcome.NORMAL, test, TestOutcome.KILLED, diff)
        passed = f"{len(tests)} tests pass"
        return WorkResult(WorkerOutcome.NORMAL, passed, TestOutcome.SURVIVED, diff)


def draw(session: Session, generator: random.Random, count: int) -> Iterator[MutationSpec]:
    """Draw executed lines, each once, and yield one mutation at one position of each."""
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
            mutant = generator.choice([other for other in here if other.start_pos == start])
            changed = behaviour(mutated(source, mutant))
            if changed is not None and changed != behaviour(source):
                yield mutant
                count -= 1
                break
            here = [other for other in here if other != mutant]
        if not count:
            return


def report(database: WorkDB) -> None:
    """Print the survivors as diffs, then the sum."""
    fates: Counter[tuple[str, str]] = Counter()
    for item, result in sorted(database.completed_work_items, key=lambda pair: pair[0].job_id):
        fate = "timeout" if result.output == "timeout" else result.test_outcome.value
        fates[str(item.mutations[0].module_path).split("/")[0], fate] += 1
        if fate == "survived":
            print(f"\nmutant {item.job_id} survived, {result.output}:\n{result.diff}")
    for room in ROOMS:
        counts = (f"{fates[room, fate]} {fate}" for fate in ("killed", "timeout", "survived"))
        print(f"{room}: {', '.join(counts)}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--seed", type=int, help="of what is drawn (default: a new one, printed)")
    parser.add_argument("--count", type=int, default=100, help="mutants (default: 100)")
    parser.add_argument(
        "--session",
        type=Path,
        default=ROOT / "build" / "mutation",
        metavar="FOLDER",
        help="begun or gone on with (default: build/mutation)",
    )
    parser.add_argument("--minutes", type=float, default=20.0, help="for this call (default: 20)")
    args = parser.parse_args()
    folder = args.session.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    written = folder / "seed"
    if not written.exists():
        written.write_text(str(secrets.randbelow(10**6) if args.seed is None else args.seed))
    seed = int(written.read_text())
    if args.seed not in (None, seed):
        parser.error(f"{folder} has seed {seed}; name another --session for another seed")
    print(f"seed {seed}, session {folder}", flush=True)
    # a shell's job in the background ignores SIGINT, and so would the tests that send one
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with use_db(str(folder / "session.sqlite")) as database:
        try:
            go_on(Session(folder, time.monotonic() + 60 * args.minutes), database, seed, args.count)
        except OutOfTime:
            print(f"{args.minutes:g} minutes are over; the same command goes on from here")
            return 1
        finally:
            report(database)
    return 0


def go_on(session: Session, database: WorkDB, seed: int, count: int) -> None:
    """Do what is left of a campaign. Raises `OutOfTime`."""
    session.copy()
    session.cover()
    if not database.num_work_items:
        drawn = enumerate(draw(session, random.Random(seed), count), start=1)
        items = [WorkItem.single(f"{number:03}", mutant) for number, mutant in drawn]
        database.add_work_items(items)
    sound: set[str] = set()
    for item in sorted(database.pending_work_items, key=lambda item: item.job_id):
        session.check_time()
        (mutant,) = item.mutations
        result = session.judge(mutant, sound)
        database.set_result(item.job_id, result)
        place = f"{mutant.module_path}:{mutant.start_pos[0]} {mutant.operator_name}"
        print(f"{item.job_id} {result.test_outcome.value}: {place}: {result.output}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
