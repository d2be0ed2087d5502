"""Whatever convert takes is a model: it is converted once, found again by place and by content, and
never mistaken.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from checkpoints import LONG_AGO, checkpoint
from formats import again

from openelm_mlx import load
from openelm_mlx.benchmarks.measure.weights import facts_of, last_part
from openelm_mlx.cli import main
from openelm_mlx.convert.targets import CONFIG
from openelm_mlx.device import mx
from openelm_mlx.engine.hub import resolve_model
from openelm_mlx.engine.model_cache import conversions, recall
from openelm_mlx.errors import ConversionError, OptionError


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("OPENELM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "converted"


def corenet_names(nano: Path, target: Path) -> Path:
    """The folder with CoreNet's names of tensors, which the engine itself does not load."""
    shutil.copytree(nano, target)
    weights = mx.load(str(target / "model.safetensors"))
    mx.save_safetensors(
        str(target / "model.safetensors"),
        {k.removeprefix("transformer."): v for k, v in weights.items()},
    )
    return target


def test_every_form_that_convert_takes_is_a_model(nano, tmp_path, cache, monkeypatch):
    folder = checkpoint(tmp_path / "corenet")
    shutil.copy(folder / "checkpoint.pt", folder.with_name("renamed.ckpt"))
    shutil.copy(folder / "tokenizer.model", tmp_path)
    forms = [
        folder / "checkpoint.pt",
        folder,
        tmp_path / "renamed.ckpt",
        again(nano, tmp_path / "nano.gguf", target_format="gguf"),
    ]
    tokens = mx.array([[1, 5, 9, 700]])
    wanted = load(nano, dtype="float32").model(tokens)
    for form in forms:
        engine = load(form, dtype="float32")
        assert mx.array_equal(engine.model(tokens), wanted), form
        assert engine.name == str(form) and engine.path.parent == cache
    names = load(corenet_names(nano, tmp_path / "names"), dtype="float32")
    assert mx.array_equal(names.model(tokens), wanted) and names.path == tmp_path / "names"
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(".").path == load("~/corenet").path == load(folder).path
    assert (
        mx.load(str(load(folder).path / "model.safetensors"))["transformer.norm.weight"].dtype
        == mx.float32
    )  # as stored


def test_it_is_announced_and_converted_once(tmp_path, cache, capsys):
    folder = checkpoint(tmp_path / "my model")
    first = resolve_model(str(folder)).folder
    said = capsys.readouterr().err
    assert (
        said.count("\n") == 1
        and str(first) in said
        and f"openelm convert '{folder}' -o FOLDER" in said
    )
    written = (first / CONFIG).stat().st_mtime_ns
    assert (
        resolve_model(str(folder)).folder == first
        and (first / CONFIG).stat().st_mtime_ns == written
    )
    assert capsys.readouterr().err == ""
    assert [one.sources for one in conversions()] == [(str(folder),)]


def test_a_copy_is_found_by_its_content_and_a_change_is_seen(tmp_path, cache, capsys):
    folder = checkpoint(tmp_path / "a")
    first = resolve_model(str(folder)).folder
    os.utime(folder / "checkpoint.pt")
    moved = shutil.copytree(folder, tmp_path / "b")
    assert (
        resolve_model(str(folder)).folder
        == resolve_model(str(moved / "checkpoint.pt")).folder
        == first
    )
    assert capsys.readouterr().err.count("converting") == 1
    path = moved / "tokenizer.model"
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(path.read_bytes())  # the same again is the same model
    assert resolve_model(str(moved)).folder == first
    text = (moved / "config.yaml").read_text()
    (moved / "config.yaml").write_text(text.replace("OpenELM", "openelm"))
    os.utime(moved / "config.yaml", ns=times)
    assert resolve_model(str(moved)).folder != first
    (moved / "config.yaml").unlink()
    assert resolve_model(str(moved)).folder != first
    assert resolve_model(str(folder)).folder == first


def test_a_change_of_the_same_size_and_time_is_seen(tmp_path, cache):
    folder = checkpoint(tmp_path / "a")
    path = folder / "config.yaml"
    first, before = resolve_model(str(folder)).folder, path.stat()
    path.write_text(path.read_text().replace("OpenELM", "openelm"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size and path.stat().st_mtime_ns == before.st_mtime_ns
    assert resolve_model(str(folder)).folder != first


def test_a_file_of_this_moment_is_hashed_again(tmp_path, cache):
    """On a file system whose clock ticks in seconds it may change once more without a trace."""
    folder = checkpoint(tmp_path / "a")
    first = resolve_model(str(folder)).folder
    assert recall(folder) == first
    os.utime(folder / "checkpoint.pt")
    assert resolve_model(str(folder)).folder == first and recall(folder) is None


def test_another_version_converts_again(tmp_path, cache, monkeypatch):
    folder = checkpoint(tmp_path / "a")
    first = resolve_model(str(folder)).folder
    monkeypatch.setattr("openelm_mlx.engine.model_cache.__version__", "9.9")
    assert resolve_model(str(folder)).folder != first


def test_a_source_that_changes_meanwhile_is_not_kept(tmp_path, cache, monkeypatch):
    folder = checkpoint(tmp_path / "a")

    class Writer:
        def write(self, text: str) -> int:  # the announcement comes between looking and converting
            os.utime(folder / "checkpoint.pt")
            return len(text)

    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", Writer())
        with pytest.raises(
            ConversionError,
            match="checkpoint.pt changed while it was converted|a changed while it was conv",
        ):
            resolve_model(str(folder))
    assert conversions() == []
    assert resolve_model(str(folder)).folder.is_dir()


def test_an_interrupted_conversion_leaves_nothing(tmp_path, cache, monkeypatch):
    folder = checkpoint(tmp_path / "a")
    cache.mkdir(parents=True)
    killed = cache / ".b-0123456789abcdef.partial-999999999-x"  # by a process that is no more
    killed.mkdir()

    class Writer:
        def write(self, text: str) -> int:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(sys, "stderr", Writer())
        with pytest.raises(KeyboardInterrupt):
            resolve_model(str(folder))
    assert conversions() == [] and run(folder).communicate(timeout=60)[0].startswith(
        str(cache)
    )  # no lock is left either
    assert len(conversions()) == 1 and not killed.exists()


def test_inspect_and_benchmark_take_the_same_models(nano, tmp_path, cache, capsys):
    path = again(nano, tmp_path / "nano.gguf", target_format="gguf")
    shown = []
    for model in (nano, path):
        assert main(["inspect", str(model), "--json"]) == 0
        shown.append(json.loads(capsys.readouterr().out) | {"name": ""})
    whys = [facts.pop("computed_in")["a GPU"][1] for facts in shown]
    assert shown[0] == shown[1]
    assert "largest activation measured" in whys[0]
    assert "no conversion has measured" in whys[1]  # a processor has no use for it
    assert facts_of(str(path), random=False) == facts_of(str(nano), random=False)
    assert last_part(str(path)) == "nano.gguf"  # where it lies is nobody's business


def run(*sources: Path, **environ: str) -> subprocess.Popen[str]:
    code = (
        "import sys\nfrom openelm_mlx.engine.hub import resolve_model\n"
        "for name in sys.argv[1:]: print(resolve_model(name).folder)"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, sources)],
        env=os.environ | environ,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_two_processes_convert_once_and_the_oldest_go(tmp_path, cache, monkeypatch):
    one, two, three = (
        checkpoint(tmp_path / name, scale)
        for name, scale in (("one", 1.0), ("two", 2.0), ("three", 3.0))
    )
    both = [run(one, two), run(one, two)]
    results = [process.communicate(timeout=60) for process in both]
    assert (
        results[0][0] == results[1][0] and (results[0][1] + results[1][1]).count("converting") == 2
    )
    first, second = map(Path, results[0][0].split())
    in_use = resolve_model(str(one)).folder  # by this process, from now on
    os.utime(f"{first}.lock", (LONG_AGO, LONG_AGO))  # and although it is the oldest
    monkeypatch.setenv("OPENELM_CACHE_GB", "0.000001")
    third = resolve_model(str(three)).folder
    assert in_use == first and first.is_dir() and third.is_dir() and not second.exists()
    assert {one.folder for one in conversions()} == {first, third}
    assert not [
        path for path in cache.iterdir() if path.name.startswith(".") or second.name in path.name
    ]


def test_a_limit_that_is_no_number(tmp_path, cache, monkeypatch):
    monkeypatch.setenv("OPENELM_CACHE_GB", "much")
    with pytest.raises(OptionError, match="OPENELM_CACHE_GB is 'much'; give a number of gigabytes"):
        resolve_model(str(checkpoint(tmp_path / "a")))


def test_a_cache_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    folder = checkpoint(tmp_path / "a")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("OPENELM_CACHE", str(tmp_path / "file"))
    assert load(folder).config.vocab_size == 4096
    said = capsys.readouterr().err
    assert "cannot be written, so this conversion is for this run only; set OPENELM_CACHE" in said
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    with pytest.raises(
        ConversionError,
        match="neither .* nor a temporary folder can be written .*; set OPENELM_CACHE",
    ):
        load(folder)


def test_a_disk_that_fills_up(tmp_path, cache, monkeypatch):
    """A limit on the size of files stands in for it: what the system refuses then is refused to the
    same call.
    """
    folder = checkpoint(tmp_path / "a")
    code = (
        "import resource, signal, sys\nfrom openelm_mlx.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", code, "generate", "Hi", "--model", folder]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    last = ran.stderr.strip().splitlines()[-1]
    assert (
        ran.returncode == 2
        and "cannot be written" in last
        and "set OPENELM_CACHE to another folder" in last
    )
    assert conversions() == [] and not [
        path for path in cache.iterdir() if path.name.startswith(".")
    ]
