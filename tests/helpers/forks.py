"""Python code in many processes, of which none imports again what all of them need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

SECONDS = 60

# It imports the modules that it is given, and forgets those of huggingface_hub, which read their
# environment when they are imported. A child then runs each code.
PARENT = """
import json, os, sys, traceback
for name in sys.argv[1:]:
    __import__(name)
for name in [name for name in sys.modules if name.partition(".")[0] == "huggingface_hub"]:
    del sys.modules[name]
for line in sys.stdin:
    code, arguments, environ, folder, files = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, file in enumerate(files, start=1):
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environ)
        sys.argv[1:], status = arguments, 0
        try:
            exec(code, {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class Forks:
    """What `forks` gives: `run` is `subprocess.run` of a code, with its output as text."""

    def __init__(self, process: subprocess.Popen[str] | None, folder: Path) -> None:
        self.process, self.folder = process, folder

    def run(
        self, code: str, arguments: Sequence[str], environ: Mapping[str, str]
    ) -> subprocess.CompletedProcess[str]:
        if self.process is None:
            command, settings = [sys.executable, "-c", code, *arguments], {"timeout": SECONDS}
            return subprocess.run(command, env=environ, capture_output=True, text=True, **settings)
        files = [self.folder / name for name in ("out", "err")]
        asked = (code, list(arguments), dict(environ), os.getcwd(), list(map(str, files)))
        print(json.dumps(asked), file=self.process.stdin, flush=True)
        status = int(self.process.stdout.readline())
        return subprocess.CompletedProcess(code, status, *(file.read_text() for file in files))


@contextmanager
def forks(folder: Path, *modules: str) -> Iterator[Forks]:
    """Give a parent of processes that has imported these modules.

    On macOS a process that has imported as much as these cannot be forked: there each is started.
    """
    if sys.platform == "darwin":
        yield Forks(None, folder)
        return
    command = [sys.executable, "-c", PARENT, *modules]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process:
        yield Forks(process, folder)
        process.stdin.close()
