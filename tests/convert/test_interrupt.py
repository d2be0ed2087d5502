"""A conversion that is stopped anywhere leaves the old target or the new one, whole, and nothing
else that loads.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest
from formats import random_folder
from golden_set import NANO

from openelm_mlx.convert import ConvertOptions, convert, pipeline
from openelm_mlx.errors import ConversionError

# One process that has imported everything forks a child for each event of the file system (opening,
# renaming, removing, making a folder) and stops it just before; what is left then is described on
# standard output.
FORKS = """
import json, os, signal, sys
from hashlib import sha256
from pathlib import Path
from openelm_mlx.convert.options import ConvertOptions
from openelm_mlx.convert import activations, pipeline, targets
import openelm_mlx.convert.targets.gguf, openelm_mlx.convert.tokenizers, openelm_mlx.convert.verify
import gguf, sentencepiece, tokenizers, sentencepiece.sentencepiece_model_pb2
from openelm_mlx.errors import OpenELMError

source, target, kind, signal_name, steps, stride = sys.argv[1:]
EVENTS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree", "os.chmod"}

def run(stop_at, options):
    pid = os.fork()
    if pid:
        return os.waitpid(pid, 0)[1]
    seen = [0]
    def hook(event, arguments):
        reads = event == "open" and isinstance(arguments[2], int) and not arguments[2] & 3
        if event in EVENTS and not reads:
            seen[0] += 1
            if seen[0] == stop_at:
                os.kill(os.getpid(), getattr(signal, signal_name))
    signal.signal(signal.SIGTERM, lambda *received: sys.exit(143))
    if steps == "two":
        targets.exchange = lambda one, other: False
    sys.addaudithook(hook)
    try:
        pipeline.convert(options)
        status = 0 if stop_at > seen[0] else 1
    except OpenELMError as error:
        print(error, file=sys.stderr)
        status = 3
    except BaseException:
        status = 2
    os._exit(status)

def state(folder):
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = sha256(path.read_bytes()).hexdigest()
    return found

activations.TOKENS = 16  # as in the process of the tests
target = Path(target)
form = {"bits": 8} if kind == "gguf" else {"bits": 4, "group_size": 32}
options = ConvertOptions(source=source, target=target, force=True, target_format=kind, **form)
for number in range(1, 500, int(stride)):
    backup = {p: p.read_bytes() for p in target.parent.rglob("*") if p.is_file()}
    status = run(number, options)
    found = state(target.parent)
    print(json.dumps({"number": number, "status": status, "state": found}), flush=True)
    if status == 0:
        break
    for p in sorted(target.parent.rglob("*"), reverse=True):
        p.rmdir() if p.is_dir() else p.unlink()
    for p, data in backup.items():
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_bytes(data)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A model so small that a conversion takes milliseconds."""
    return random_folder(tmp_path_factory.mktemp("source"))


def interrupted(
    source: Path, tmp_path: Path, kind: str, name: str, steps: str, stride: int = 1
) -> list[dict]:
    """What lies in the folder after each interruption; the last entry is the run that was not
    interrupted.
    """
    (tmp_path / "work").mkdir()
    target = tmp_path / "work" / "model"
    convert(ConvertOptions(source=source, target=target, target_format=kind))
    run = subprocess.run(
        [sys.executable, "-c", FORKS, source, target, kind, name, steps, str(stride)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert lines[-1]["status"] == 0 and len(lines) > 3
    return lines


def folders(state: dict[str, str], name: str) -> dict[str, dict[str, str]]:
    """The folders (or, for GGUF, files) of a state by name."""
    result: dict[str, dict[str, str]] = {}
    for path, content in state.items():
        top, _, rest = path.partition("/")
        result.setdefault(top, {})[rest] = content
    return result


@pytest.mark.needs("another system than macOS")  # it forks a process that has imported MLX
@pytest.mark.parametrize(
    ("kind", "name", "steps", "stride"),
    [
        ("mlx", "SIGKILL", "one", 1),
        ("mlx", "SIGKILL", "two", 2),
        ("gguf", "SIGKILL", "one", 1),
        ("mlx", "SIGINT", "one", 4),
        ("mlx", "SIGTERM", "one", 5),
    ],
)
def test_stopped_before_any_event_of_the_file_system(tmp_path, source, kind, name, steps, stride):
    lines = interrupted(source, tmp_path, kind, name, steps, stride)
    new = folders(lines[-1]["state"], "model")
    assert list(new) == ["model"]
    old = {"model": folders_of(tmp_path, source, kind)}
    seen = set()
    for line in lines[:-1]:
        found = folders(line["state"], "model")
        target = found.pop("model", None)
        seen.add(
            "old"
            if target == old["model"]
            else "new"
            if target == new["model"]
            else "gone"
            if target is None
            else "mixed"
        )
        for other in (
            found.values()
        ):  # what is left beside it does not load, unless it is the old model, whole
            assert "config.json" not in other or other in (old["model"], new["model"])
        if name != "SIGKILL" and line["status"] == 2 << 8:
            assert found == {} or old["model"] in found.values()
        if target is None:  # two renames: the old model lies beside, and the next run puts it back
            assert steps == "two" and old["model"] in found.values()
    assert "old" in seen and "mixed" not in seen
    assert steps == "two" or "gone" not in seen


def folders_of(tmp_path: Path, source: Path, kind: str) -> dict[str, str]:
    """The state of the target before the interrupted run."""
    root = tmp_path / "before" / "model"
    convert(ConvertOptions(source=source, target=root, target_format=kind))
    paths = [root] if root.is_file() else [path for path in root.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(root)) if root.is_dir() else "": sha256(path.read_bytes()).hexdigest()
        for path in paths
    }


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_the_next_run_removes_what_a_killed_one_left(tmp_path, source):
    stale = tmp_path / f".model.partial-{dead_pid()}-abc"
    stale.mkdir()
    (stale / "model.safetensors").write_bytes(b"x")
    running = tmp_path / f".model.partial-{os.getpid()}-abc"
    running.mkdir()
    foreign = tmp_path / ".model.partial-mine"
    foreign.mkdir()
    convert(ConvertOptions(source=source, target=tmp_path / "model"))
    assert not stale.exists() and running.exists() and foreign.exists()


def test_the_next_run_puts_back_what_a_killed_one_had_moved_aside(tmp_path, source):
    convert(ConvertOptions(source=source, target=tmp_path / "model"))
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model").rename(tmp_path / f".model.old-{dead_pid()}-abc")
    with pytest.raises(
        ConversionError, match="exists; choose another folder, or replace it with --force"
    ):
        convert(ConvertOptions(source=source, target=tmp_path / "model", bits=4, group_size=32))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path, source):
    def appear(done, total, name):
        (tmp_path / "model").mkdir(exist_ok=True)
        (tmp_path / "model" / "mine").write_text("x")

    with pytest.raises(
        ConversionError,
        match="has appeared meanwhile; choose another one, or replace it with --force",
    ):
        convert(ConvertOptions(source=source, target=tmp_path / "model"), progress=appear)
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "mine"]


@pytest.mark.parametrize("kind", ["mlx", "gguf"])
@pytest.mark.parametrize("space", [600, 1200])
def test_a_full_disk_leaves_the_old_target(tmp_path, kind, space, monkeypatch):
    """A file system of its own with `space` KB left beside the old target; the new one needs 5
    MB.
    """
    disk = tmp_path / "disk"
    disk.mkdir()
    old = tmp_path / "old"
    convert(ConvertOptions(source=NANO / "checkpoint.pt", target=old, target_format=kind, bits=8))
    used = (
        sum(path.stat().st_size for path in ([old] if old.is_file() else old.iterdir())) // 1024
        + 64
    )
    options = ["-t", "tmpfs", "-o", f"size={used + space}k", "tmpfs"]
    mounted = (
        subprocess.run(["mount", *options, disk], capture_output=True).returncode == 0
        if sys.platform == "linux"
        else False
    )
    if not mounted:
        pytest.skip("wants the right to mount a tmpfs")
    try:
        shutil.copy(old, disk / "model") if old.is_file() else shutil.copytree(old, disk / "model")
        before = {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()}
        options = ConvertOptions(
            source=NANO / "checkpoint.pt", target=disk / "model", target_format=kind, force=True
        )
        message = "its weights take 5,249,536 bytes, but .*disk has .* left; free some space, or"
        with pytest.raises(ConversionError, match=message):
            convert(options)
        monkeypatch.setattr(pipeline, "check_space", lambda target, nbytes: None)  # it fills later
        with pytest.raises(
            ConversionError, match="cannot be written: .*(No space left on device|is the disk full)"
        ):
            convert(options)
        assert {path: path.read_bytes() for path in disk.rglob("*") if path.is_file()} == before
    finally:
        subprocess.run(["umount", disk], check=True)


def test_sigterm_on_the_command_line_leaves_nothing(tmp_path, source):
    """The command stopped from inside, as a process manager would, in the middle of writing."""
    code = (
        "import os, signal, sys; from openelm_mlx.convert.targets import folder\n"
        "write = folder.write_weights\n"
        "def stop(*arguments, **fields):\n"
        "    write(*arguments, **fields); os.kill(os.getpid(), signal.SIGTERM)\n"
        "folder.write_weights = stop\n"
        "from openelm_mlx.cli import main; sys.exit(main(['convert', *sys.argv[1:]]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, source, "-o", tmp_path / "model"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 143 and list(tmp_path.iterdir()) == []
    assert "Traceback" not in run.stderr
