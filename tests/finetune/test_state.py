"""A run that was stopped goes on with the same numbers, and nothing of a user's is replaced."""

from __future__ import annotations

import random
import signal
from itertools import count
from pathlib import Path

import finetune_kills
import pytest
from training import curve, options, small_engine, write_pairs

from openelm_mlx.device import mx
from openelm_mlx.errors import CheckpointError, FinetuneError, OptionError
from openelm_mlx.finetune import finetune, state
from openelm_mlx.finetune.run import prepared
from openelm_mlx.finetune.step import Step
from openelm_mlx.stopping import StopKey

RESULTS = "adapters.safetensors", "model.safetensors"


class Stop:
    """A progress that presses Ctrl-C at a row, counted from 1, or raises what that does."""

    def __init__(self, rows: int, raised: bool = False) -> None:
        self.left, self.raised = rows, raised

    def __call__(self, row, steps):
        self.left -= 1
        if self.left == 0 and self.raised:
            raise KeyboardInterrupt
        if self.left == 0:
            signal.raise_signal(signal.SIGINT)


class Killed(BaseException):
    """What ends a run as SIGKILL does: nothing is done about it."""


def killed(row, steps):
    if row["step"] == 3:
        raise Killed


def result(folder: Path) -> bytes:
    return next((folder / name).read_bytes() for name in RESULTS if (folder / name).exists())


WAYS = {
    "LoRA with dropout": {"dropout": 0.2},
    "DoRA, accumulated": {"method": "dora", "batch": 1, "accumulate": 2},
    "all weights": {"method": "full", "learning_rate": 1e-3},
    "another optimizer": {"optimizer": "muon", "packing": True, "batch": 1},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_stopped_and_killed_run_goes_on_bit_for_bit(tiny, pairs, tmp_path, way):
    asked = options(**WAYS[way])
    finetune(small_engine(tiny), pairs, tmp_path / "whole", asked)
    for end, kind in ((Stop(3), KeyboardInterrupt), (killed, Killed)):
        with pytest.raises(kind):
            again = small_engine(tiny)
            finetune(again, pairs, tmp_path / "out", asked, resume=True, progress=end)
    finetune(small_engine(tiny), pairs, tmp_path / "out", asked, resume=True)
    assert curve(tmp_path / "out") == curve(tmp_path / "whole")
    assert result(tmp_path / "out") == result(tmp_path / "whole")


def test_an_interrupt_at_each_row_loses_no_step(engine, pairs, tmp_path):
    finetune(engine, pairs, tmp_path / "whole", options(save_every=50))
    rows = curve(tmp_path / "whole")
    for number in range(1, len(rows)):
        with pytest.raises(KeyboardInterrupt):
            asked = options(save_every=40 + number)  # it changes no number
            finetune(
                engine,
                pairs,
                tmp_path / "out",
                asked,
                resume=True,
                progress=Stop(1, number % 2 == 0),
            )
        assert curve(tmp_path / "out") == rows[:number]
    finetune(engine, pairs, tmp_path / "out", options(), resume=True)
    assert curve(tmp_path / "out") == rows


def test_what_a_kill_leaves_behind_is_taken(engine, pairs, tmp_path):
    """The folder before the first checkpoint; half a row; files that were being written."""
    asked = options()
    finetune(engine, pairs, tmp_path / "whole", asked)
    out = tmp_path / "out"
    out.mkdir()
    (out / ".state.safetensors.x7.safetensors").write_bytes(b"half")
    with pytest.raises(Killed):
        finetune(engine, pairs, out, asked, progress=killed)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    (out / ".best.safetensors.x7.safetensors").write_bytes(b"half")
    for name in ("metrics.jsonl", "adapter_config.json", "README.md", "loss.png", "finetune.json"):
        (out / f".{name}.x7").write_bytes(b"half")
    (out / "adapters.safetensors").write_bytes(b"half")
    finetune(engine, pairs, out, asked, resume=True)
    assert curve(out) == curve(tmp_path / "whole") and result(out) == result(tmp_path / "whole")
    assert {path.name for path in out.iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }


def test_an_evaluation_after_the_checkpoint_is_told_once(engine, pairs, tmp_path):
    """Ctrl-C after a step whose evaluation is due; a kill after that evaluation."""

    def killed_there(row, steps):
        if "best" in row:
            raise Killed

    asked = options(save_every=50, epochs=1.0)
    finetune(engine, pairs, tmp_path / "whole", asked)
    for end, kind in ((Stop(2), KeyboardInterrupt), (killed_there, Killed)):
        with pytest.raises(kind):
            finetune(engine, pairs, tmp_path / "out", asked, resume=True, progress=end)
    assert curve(tmp_path / "out") == curve(tmp_path / "whole")[:3]
    finetune(engine, pairs, tmp_path / "out", asked, resume=True)
    assert curve(tmp_path / "out") == curve(tmp_path / "whole")


@pytest.fixture
def begun(engine, pairs, tmp_path):
    """The folder of a run that was stopped."""
    with pytest.raises(KeyboardInterrupt):
        finetune(engine, pairs, tmp_path / "out", options(), progress=Stop(3))
    return tmp_path / "out"


def test_two_runs_are_not_in_one_folder(engine, pairs, tmp_path):
    def another(row, steps):
        finetune(engine, pairs, tmp_path / "out", options(), resume=True)

    with pytest.raises(OptionError) as raised:
        finetune(engine, pairs, tmp_path / "out", options(), progress=another)
    what = "has a run that another process is at; wait for its end, or give another folder"
    assert str(raised.value) == f"{tmp_path / 'out'} {what}"


def test_a_run_that_another_process_has_ended_is_not_taken_up(engine, pairs, begun):
    late = prepared(engine, pairs, begun, options(), resume=True)
    finetune(engine, pairs, begun, options(), resume=True)
    with pytest.raises(OptionError, match="has a run that is finished"), StopKey() as stop:
        late.whole(lambda row, steps: None, stop)


def test_an_evaluation_is_left_and_begun_again(engine, pairs, tmp_path, monkeypatch):
    """Ctrl-C while the second of its batches is computed."""
    asked = options(batch=1, epochs=1.0)
    finetune(engine, pairs, tmp_path / "whole", asked)
    original, calls = Step.evaluate, count()

    def evaluate(step, batch):
        if next(calls) == 3:
            signal.raise_signal(signal.SIGINT)
        return original(step, batch)

    monkeypatch.setattr(Step, "evaluate", evaluate)
    with pytest.raises(KeyboardInterrupt):
        finetune(engine, pairs, tmp_path / "out", asked)
    assert curve(tmp_path / "out") == curve(tmp_path / "whole")[:2]
    finetune(engine, pairs, tmp_path / "out", asked, resume=True)
    assert curve(tmp_path / "out") == curve(tmp_path / "whole")


def test_nothing_is_replaced_unasked(engine, pairs, begun, tmp_path):
    with pytest.raises(OptionError) as raised:
        finetune(engine, pairs, begun, options())
    what = "has a run that is not finished; continue it with --resume, or give another folder"
    assert str(raised.value) == f"{begun} {what}"
    finetune(engine, pairs, begun, options(), resume=True)
    (begun / "state.safetensors").touch()  # as a kill leaves it, after the last write
    with pytest.raises(OptionError) as raised:
        finetune(engine, pairs, begun, options(), resume=True)
    assert not (begun / "state.safetensors").exists()
    what = "has a run that is finished; give another folder; to train its result further, give"
    assert str(raised.value) == f"{begun} {what} it as --adapter or as MODEL"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(OptionError) as raised:
        finetune(engine, pairs, tmp_path / "mine", options(), resume=True)
    what = "is not empty (it has notes.txt), and nothing in it is replaced; give another folder"
    assert str(raised.value) == f"{tmp_path / 'mine'} {what}"
    with pytest.raises(OptionError) as raised:
        finetune(engine, pairs, pairs, options())
    assert str(raised.value) == f"{pairs} is not a folder; give the name of one"


def test_another_run_is_not_gone_on_with(tiny, engine, pairs, begun, tmp_path):
    end = "; give the same to go on, or another folder"
    others = write_pairs(tmp_path / "others.jsonl", 7)
    for given, what in (
        ((small_engine(tiny, 4), pairs, options()), "weights"),
        ((engine, others, options()), "data"),
        (
            (engine, pairs, options(dropout=0.5, beta2=0.5)),
            "beta2 (0.95 there, 0.5 here), dropout (0.0 there, 0.5 here)",
        ),
    ):
        with pytest.raises(FinetuneError) as raised:
            model, data, asked = given
            finetune(model, data, begun, asked, resume=True)
        assert str(raised.value) == f"{begun} has a run with other {what}{end}"


def test_what_errors_quote_of_another_run(tmp_path):
    now = {"version": "2", "weights": "a" * 99, "options": {"rank": 2}}
    state.check_same(tmp_path, now, now)
    with pytest.raises(FinetuneError) as raised:
        state.check_same(tmp_path, {"version": "1", "weights": "b", "options": {}}, now)
    what = "rank (None there, 2 here), version (1 there, 2 here), weights"
    end = "; give the same to go on, or another folder"
    assert str(raised.value) == f"{tmp_path} has a run with other {what}{end}"


def test_a_damaged_checkpoint_is_refused(engine, pairs, begun):
    path = begun / "state.safetensors"
    arrays, about = state.read_arrays(path)
    state.write_arrays(path, {**arrays, "more": mx.array(1)}, about)
    with pytest.raises(CheckpointError) as raised:
        finetune(engine, pairs, begun, options(), resume=True)
    what = "the checkpoint has other tensors than this run trains"
    assert str(raised.value) == f"{what}; give another folder, and begin again"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError) as raised:
        finetune(engine, pairs, begun, options(), resume=True)
    said = str(raised.value)
    assert said.startswith(f"{path} cannot be read as a checkpoint (")
    assert said.endswith("); give another folder, and begin again") and "\n" not in said
    mx.save_safetensors(str(path), arrays, {"format": "mlx"})
    with pytest.raises(CheckpointError, match=r"\(it is not of this version of openelm-mlx\)"):
        finetune(engine, pairs, begun, options(), resume=True)


def test_a_process_that_is_killed_goes_on(tmp_path):
    found = finetune_kills.killed(tmp_path, "lora", 6, 1, random.Random(4))
    assert (found["kills"], found["differing"], found["rows"]) == (1, 0, 9) and found["runs"] > 0
