"""`openelm models`: every name, what of it is on this disk, and its removal; what doctor says of
the caches.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from golden_set import NANO
from huggingface_hub import constants

from openelm_mlx.cli import main
from openelm_mlx.cli.models import size_text
from openelm_mlx.convert.fetch import CATALOG
from openelm_mlx.engine.hub import SHORT_NAMES, resolve_model


@pytest.fixture
def disk(tmp_path, monkeypatch) -> Path:
    """Empty caches of the hub's client and of this project."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("OPENELM_CACHE", str(tmp_path / "ours"))
    (tmp_path / "hub").mkdir()
    return tmp_path


def fetched(disk: Path, hub_id: str, size: int = 5000) -> Path:
    """A repository as the hub's client keeps it."""
    folder = disk / "hub" / f"models--{hub_id.replace('/', '--')}"
    for part in ("blobs", "refs", f"snapshots/{'a' * 40}"):
        (folder / part).mkdir(parents=True)
    (folder / "blobs" / "x").write_bytes(b"w" * size)
    (folder / "refs" / "main").write_text("a" * 40)
    (folder / "snapshots" / ("a" * 40) / "model.safetensors").symlink_to("../../blobs/x")
    return folder


def convert_elsewhere(*sources: Path) -> None:
    """Fill the cache from a process that has ended."""
    code = (
        "import sys\nfrom openelm_mlx.engine.hub import resolve_model\n"
        "for name in sys.argv[1:]: resolve_model(name)"
    )
    subprocess.run(
        [sys.executable, "-c", code, *map(str, sources)],
        check=True,
        capture_output=True,
        timeout=60,
    )


def listed(capsys) -> dict[str, dict]:
    assert main(["models", "--json"]) == 0
    return {one["name"]: one for one in json.loads(capsys.readouterr().out)["models"]}


def test_answers_of_evaluations_that_were_stopped_are_shown(disk, capsys):
    assert main(["models"]) == 0
    assert "answers of" not in capsys.readouterr().out
    folder = disk / "ours" / "answers"
    folder.mkdir(parents=True)
    (folder / "0123456789abcdef-0.sqlite").write_bytes(b"x" * 12345)
    assert main(["models"]) == 0
    said = f"answers of evaluations that were stopped, 12.3 kB in {folder}: they go after 30 days"
    assert f"\n{said}\n" in capsys.readouterr().out
    assert main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["answers"]
    assert found == {"path": str(folder), "nbytes": 12345}


def test_every_name_is_listed_with_what_is_here(disk, capsys):
    fetched(disk, "apple/OpenELM-270M")
    fetched(disk, "mlx-community/OpenELM-450M-4bit", 70)
    fetched(disk, "someone/another-model")
    (disk / "ours" / "corenet-3b").mkdir(parents=True)
    (disk / "ours" / "corenet-3b" / "checkpoint.pt.part").write_bytes(b"12345")
    models = listed(capsys)
    assert (
        models.keys() >= {"openelm-tiny", *SHORT_NAMES, *CATALOG}
        and "someone/another-model" not in models
    )
    here = {name: one["nbytes"] for name, one in models.items() if one["path"]}
    del here["openelm-tiny"]
    assert here == {"270m": 5040, "mlx-community/OpenELM-450M-4bit": 110, "corenet:3b": 5}
    assert models["corenet:3b"]["partial"] and not models["270m"]["partial"]
    assert main(["models"]) == 0
    shown = capsys.readouterr().out
    assert all(
        f"\n{name} " in shown
        for name in (*SHORT_NAMES, *(name for name in CATALOG if "@" not in name))
    )
    assert (
        "5.0 kB  apple/OpenELM-270M" in shown
        and "5 bytes  CoreNet's pretrained checkpoint (fetched in part)" in shown
    )
    assert "345k" in shown and str(disk / "hub") in shown


def test_a_conversion_is_listed_and_removed_by_its_file(disk, capsys, monkeypatch):
    one, two = (
        Path(shutil.copytree(NANO, disk / name)) / "checkpoint.pt" for name in ("one", "two")
    )
    two.with_name("config.yaml").unlink()
    convert_elsewhere(one, two)
    models = {name: entry for name, entry in listed(capsys).items() if entry["kind"] == "converted"}
    assert sorted(entry["about"] for entry in models.values()) == [str(one), str(two)]
    in_use = resolve_model(str(two)).folder
    monkeypatch.chdir(disk / "one")
    assert main(["models", "remove", "checkpoint.pt", "--yes"]) == 0
    assert capsys.readouterr().out.startswith("removed checkpoint-")
    assert [name for name, entry in listed(capsys).items() if entry["kind"] == "converted"] == [
        in_use.name
    ]
    assert main(["models", "remove", in_use.name, "--yes"]) == 2 and in_use.is_dir()
    assert "stays: a process uses it; end that first" in capsys.readouterr().err


def test_what_was_fetched_is_removed_and_nothing_else(disk, capsys):
    folder, other = fetched(disk, "apple/OpenELM-270M"), fetched(disk, "apple/OpenELM-450M")
    cut = disk / "hub" / "models--apple--OpenELM-3B" / "blobs"
    cut.mkdir(parents=True)
    (cut / "x.incomplete").write_bytes(b"123")
    corenet = disk / "ours" / "corenet-mlx-1.1b-4bit"
    corenet.mkdir(parents=True)
    assert listed(capsys)["3b"]["partial"]
    assert (
        main(["models", "remove", "270m", "apple/OpenELM-3B", "corenet-mlx:1.1b-4bit", "--yes"])
        == 0
    )
    assert capsys.readouterr().out == "removed 270m\nremoved 3b\nremoved corenet-mlx:1.1b-4bit\n"
    assert (
        not folder.exists() and not cut.parent.exists() and not corenet.exists() and other.exists()
    )


def test_removing_asks_first(disk, capsys, monkeypatch):
    folder = fetched(disk, "apple/OpenELM-270M")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert main(["models", "remove", "270m"]) == 2
    assert "nothing was removed: nobody can be asked here; give --yes" in capsys.readouterr().err
    for answer, status in (("n\n", 1), ("", 1), ("y\n", 0)):
        assert folder.exists()
        monkeypatch.setattr(sys, "stdin", Terminal(answer))
        assert main(["models", "remove", "270m"]) == status
        assert f"270m: 5.0 kB in {folder}\nremove? [y/N]" in capsys.readouterr().err
    assert not folder.exists()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("270m", "270m is not on this disk; `openelm models` lists what is"),
        ("nonsense", "nonsense is not on this disk"),
        ("openelm-tiny", "openelm-tiny comes with openelm-mlx and stays as long as it does"),
        ("corenet:270mm", "did you mean corenet:270m, "),
    ],
)
def test_what_cannot_be_removed(disk, capsys, name, said):
    assert main(["models", "remove", name, "--yes"]) == 2 and said in capsys.readouterr().err


def test_doctor_names_the_caches_that_are_used(disk, capsys, monkeypatch):
    """The hub's as the hub's client itself says, whatever variable moved it."""
    (disk / "ours" / "converted" / "m").mkdir(parents=True)
    (disk / "ours" / "converted" / "m" / "config.json").write_text("{}" * 750)
    monkeypatch.setattr("openelm_mlx.benchmarks.doctor.self_test.WAYS", ())
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert str(disk / "hub") in shown and f"{disk / 'ours' / 'converted'} (1.5 kB)" in shown
    assert "bytes" not in shown and "None" not in shown
    code = "from openelm_mlx.cli.doctor import caches; print(caches()['hub_cache'])"
    environ = {key: value for key, value in os.environ.items() if not key.startswith("HF_")} | {
        "XDG_CACHE_HOME": "/x"
    }
    ran = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True)
    assert ran.stdout == "/x/huggingface/hub\n"


def test_sizes_are_told_in_the_unit_that_fits():
    sizes = {
        0: "0 bytes",
        999: "999 bytes",
        1000: "1.0 kB",
        999_949: "999.9 kB",
        999_999: "1.0 MB",
        25_276_514_304: "25.3 GB",
        1.2e15: "1200.0 TB",
    }
    assert {size: size_text(size) for size in sizes} == sizes
