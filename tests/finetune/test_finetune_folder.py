"""Where a run may be written, and what of a stopped one may be damaged."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import pytest
from full_disk import files_of_at_most
from training import options, small_engine, write_pairs

from openelm_mlx.device import mx
from openelm_mlx.errors import CheckpointError, FinetuneError, OptionError
from openelm_mlx.finetune import finetune, state


def refused(folder: Path, *sources: object) -> str:
    with pytest.raises(OptionError) as raised:
        state.check_folder(folder, True, *map(str, sources))
    return str(raised.value)


def test_a_folder_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    link = Path("link")
    link.symlink_to("nowhere")
    what = "link is a symbolic link to nowhere, which does not exist"
    assert refused(link) == f"{what}; make that folder, or give another"
    end = "n cannot be written: File name too long; give another folder"
    assert refused(Path("n" * 300)).endswith(end)
    said = refused(Path(os.fsdecode(b"name\xff")))
    end = "is not a name in UTF-8, and MLX writes no other; give another folder"
    assert said == f"{str(tmp_path / 'name')[:-4]!r}"[:-1] + rf"name\udcff' {end}"
    Path("nowhere").mkdir()
    assert state.check_folder(link, False) is False


def test_a_folder_that_is_read_as_data_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = tmp_path / "data"
    data.mkdir()
    said = "data/new/out lies in data, all of which is read as data; give a folder outside it"
    assert refused(Path("data/new/out"), "pairs.jsonl", "data") == said
    assert refused(Path("data"), "data").startswith("data lies in data, ")
    assert state.check_folder(tmp_path / "data-out", False, "data", None) is False


def test_a_checkpoint_that_says_nothing_of_its_run_is_refused(tmp_path):
    end = "give another folder, and begin again"
    whole = {"standing": {"step": 1}, "identity": {"options": {}}, "fit": {}}
    for about in ([1], {}, {**whole, "identity": {}}, {**whole, "fit": None}, {**whole, "x": {}}):
        state.write_arrays(tmp_path / state.STATE, {"a": mx.zeros(1)}, about)
        with pytest.raises(CheckpointError) as raised:
            state.read_state(tmp_path)
        what = "cannot be read as a checkpoint (what it says of the run is damaged)"
        assert str(raised.value) == f"{tmp_path / state.STATE} {what}; {end}"
    best = {**whole, "standing": {"best_loss": 1.0}}
    state.write_arrays(tmp_path / state.STATE, {"a": mx.zeros(1)}, best)
    with pytest.raises(CheckpointError) as raised:
        state.read_state(tmp_path)
    said = f"{tmp_path / state.BEST} cannot be read as a checkpoint (it is missing); {end}"
    assert str(raised.value) == said
    assert state.standing_of(tmp_path, whole).step == 1
    with pytest.raises(CheckpointError) as raised:
        state.standing_of(tmp_path, {"standing": {"steps": 1}})
    assert str(raised.value).endswith(f"(where the run was is damaged); {end}")


def test_rows_that_are_no_text_are_dropped_from_the_metrics(tmp_path):
    path = tmp_path / state.METRICS
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n\xff\xfe\x00\n')
    assert [*state.rows_until(path, state.Standing(step=1))] == ['{"step": 1, "loss": 2.0}\n']


def test_a_full_disk_and_a_folder_that_is_gone_are_told_with_what_to_do(tiny, tmp_path):
    pairs, end = write_pairs(tmp_path / "pairs.jsonl"), "and --resume goes on from what it has"
    full = tmp_path / "full"
    with files_of_at_most(1000), pytest.raises(FinetuneError) as raised:
        finetune(small_engine(tiny), pairs, full, options())
    assert re.fullmatch(
        rf"{full} cannot be written: \[write\] .* to file; mend that, {end}", str(raised.value)
    )
    assert [*full.iterdir()] == []
    written = finetune(small_engine(tiny), pairs, full, options(), resume=True)
    assert written.ended == "all steps are done"
    gone = tmp_path / "gone"
    with pytest.raises(FinetuneError) as raised:
        finetune(
            small_engine(tiny),
            pairs,
            gone,
            options(save_every=1),
            progress=lambda row, steps: shutil.rmtree(gone),
        )
    said = f"{gone} cannot be written: No such file or directory; mend that, {end}"
    assert str(raised.value) == said
    with pytest.raises(RuntimeError, match="another"), state.writing(gone):
        raise RuntimeError("another")
