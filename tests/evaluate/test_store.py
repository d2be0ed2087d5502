"""Answers that are kept: what is found again, and what a damaged file or a full disk costs."""

from __future__ import annotations

import os
import sqlite3
import time
from pathlib import Path

import pytest
from full_disk import files_of_at_most
from small import random_engine

from openelm_mlx.engine.loading import Engine
from openelm_mlx.evaluate import store as module
from openelm_mlx.evaluate.store import KEPT_DAYS, Store, answers_folder

pytestmark = pytest.mark.usefixtures("cache")


def names() -> list[str]:
    return sorted(path.name.partition("-")[2] for path in answers_folder().iterdir())


def kept(engine, tokens: int = 64, **passes: list) -> None:
    with Store(engine, tokens) as store:
        for key, answers in passes.items():
            store.add(key, answers)


def test_answers_are_found_again_exactly(small, capsys):
    answers = [[-0.1, True], [float("-inf"), False], ["text \u2028 é \n"]]
    kept(small, one=answers, two=[])
    with Store(small, 64) as store:
        assert store.get("one") == answers and store.get("two") == [] and store.get("no") is None
        store.add("one", [[1.0, True]])
        assert store.get("one") == [[1.0, True]]
    assert names() == ["0.lock", "0.sqlite"]
    with Store(small, 64) as store:
        assert store.get("one") == [[1.0, True]]
        store.finish()
    assert names() == [] and capsys.readouterr().err == ""


def test_what_changes_numbers_has_files_of_its_own(small, monkeypatch):
    kept(small, one=[1])
    others = [Store(small, 65), Store(random_engine(small, 4), 64)]
    for name, value in (("__version__", "99"), ("FORMAT", "of tomorrow")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            others.append(Store(small, 64))
    monkeypatch.setenv("MLX_ENABLE_TF32", "another")
    others.append(Store(small, 64))
    assert [store.get("one") for store in others] == [None] * 5
    assert len(list(answers_folder().glob("*.sqlite"))) == 6
    for store in others:
        store.finish()
    assert names() == ["0.lock", "0.sqlite"]


def test_several_processes_have_a_file_each_and_read_all(small):
    first, second = Store(small, 64), Store(small, 64)
    first.add("one", [1])
    second.add("two", [2])
    third = Store(small, 64)
    assert third.get("one") == [1] and third.get("two") == [2] and first.get("two") is None
    third.add("three", [3])
    third.finish()  # the others still use theirs
    assert {name for name in names() if name.endswith("sqlite")} == {"0.sqlite", "1.sqlite"}
    second.add("four", [4])
    second.close()
    first.finish()
    assert names() == []


def damage(kind: str, path: Path, engine: Engine) -> None:
    if kind == "rubbish":
        path.write_bytes(b"what is this?" * 1000)
    elif kind == "cut":
        os.truncate(path, path.stat().st_size // 2)
    elif kind == "a changed answer":
        data = path.read_bytes()
        assert data.count(b"[12345]") == 1
        path.write_bytes(data.replace(b"[12345]", b"[12346]"))
    elif kind == "of another evaluation":
        path.unlink()
        kept(engine, 65, one=[12345])
        (other,) = answers_folder().glob("*.sqlite")
        other.rename(path)
        other.with_suffix(".lock").unlink()
    else:
        path.unlink()
        with sqlite3.connect(path) as file:
            file.execute("CREATE TABLE songs (name TEXT)")
        file.close()


@pytest.mark.parametrize(
    "kind", ["rubbish", "cut", "a changed answer", "of another evaluation", "foreign"]
)
def test_a_damaged_file_is_set_aside(small, capsys, kind):
    kept(small, one=[12345])
    (path,) = answers_folder().glob("*.sqlite")
    damage(kind, path, small)
    with Store(small, 64) as store:
        assert store.get("one") is None
        assert (
            capsys.readouterr().err
            == f"openelm: {path} is damaged, and it is set aside, as .damaged\n"
        )
        store.add("one", [2])
    with Store(small, 64) as store:
        assert store.get("one") == [2] and capsys.readouterr().err == ""
        store.finish()
    assert names() == []


def test_a_damaged_file_of_another_process_stays_where_it_is(small, capsys):
    first = Store(small, 64)
    (path,) = answers_folder().glob("*-0.sqlite")
    with sqlite3.connect(path) as file:
        file.execute("INSERT INTO passes VALUES ('one', '[1]', 'wrong')")
    file.close()
    with Store(small, 64) as store:
        assert store.get("one") is None
    said = f"openelm: {path} is damaged, and another process uses it; its answers are left out\n"
    assert capsys.readouterr().err == said and path.exists()
    first.close()


def test_an_empty_file_is_begun(small, capsys):
    kept(small)
    (path,) = answers_folder().glob("*.sqlite")
    path.write_bytes(b"")
    kept(small, one=[1])
    assert Store(small, 64).get("one") == [1] and capsys.readouterr().err == ""


def test_what_cannot_be_opened_of_another_process_is_left_out(small, capsys):
    """It may go at this moment, as that process has ended; a folder stands for it."""
    kept(small, one=[1])
    (path,) = answers_folder().glob("*-0.sqlite")
    path.with_name(path.name.replace("-0.", "-1.")).mkdir()
    with Store(small, 64) as store:
        assert store.get("one") == [1] and capsys.readouterr().err == ""
        with Store(small, 64) as second:  # this one would write it
            assert second.get("one") == [1] and REMEDY in capsys.readouterr().err


REMEDY = "so a run that is stopped starts anew; make room there, or set OPENELM_CACHE to another"


def test_a_full_disk_is_said_once(small, capsys):
    with Store(small, 64) as store, files_of_at_most(64 << 10):
        for number in range(99):
            store.add(str(number), ["x" * 3000])
        said = capsys.readouterr().err
        assert said.startswith(f"openelm: answers cannot be kept in {answers_folder()} (")
        assert REMEDY in said and said.count("\n") == 1
        assert store.get("98") == ["x" * 3000]
    with Store(small, 64) as store:  # what came before is whole
        assert store.get("0") == ["x" * 3000] and store.get("98") is None


def test_a_folder_that_cannot_be_written_is_said_once(small, capsys, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("OPENELM_CACHE", str(tmp_path / "file"))
    with Store(small, 64) as store:
        store.add("one", [1])
        assert store.get("one") == [1]
        store.finish()
    said = capsys.readouterr().err
    assert "answers (Not a directory), " in said and REMEDY in said and said.count("\n") == 1


def test_answers_of_runs_that_never_go_on_are_removed(small):
    kept(small, one=[1])
    kept(small, 65, one=[1])
    running, old = Store(small, 66), time.time() - KEPT_DAYS * 86400 - 60
    for path in answers_folder().glob("*.lock"):
        os.utime(path, (old, old))
    kept(small, 67)
    assert names() == ["0.lock"] * 2 + ["0.sqlite"] * 2 + ["0.sqlite-shm", "0.sqlite-wal"]
    running.finish()
    assert names() == ["0.lock", "0.sqlite"]
