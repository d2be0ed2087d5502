"""Logs of a fine-tuning: what TensorBoard and wandb are given is what the metrics say."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from openelm_mlx.errors import OptionError
from openelm_mlx.finetune import logs

ROWS = [
    {"step": 0, "validation_loss": 4.5, "best": True},
    {"step": 1, "epoch": 0.5, "loss": 3.5, "learning_rate": 0.25},
    {"step": 2, "epoch": 1.0, "loss": 2.5, "learning_rate": 0.125},
]
ABOUT = {"rank": 8, "targets": ["qkv_proj"]}


def scalars(folder: Path) -> list[tuple[int, str, float]]:
    """Return the step, name and number of every record in TensorBoard's files, oldest first."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events*"), key=lambda path: path.stat().st_mtime_ns):
        data, place = path.read_bytes(), 0
        while place < len(data):  # a record: its length, a checksum, the record, a checksum
            (length,) = struct.unpack_from("<Q", data, place)
            event = Event.FromString(data[place + 12 : place + 12 + length])
            place += length + 16
            values = [value for value in event.summary.value if value.HasField("simple_value")]
            found += [(event.step, value.tag, value.simple_value) for value in values]
    return found


@pytest.mark.needs("TensorBoard")
def test_tensorboard_gets_every_number_at_its_step(tmp_path):
    with logs.opened(["tensorboard"], tmp_path, ABOUT) as log:
        for row in ROWS:
            log(row)
    assert scalars(tmp_path / "tensorboard") == [
        (0, "validation/loss", 4.5),
        (1, "training/epoch", 0.5),
        (1, "training/loss", 3.5),
        (1, "training/learning_rate", 0.25),
        (2, "training/epoch", 1.0),
        (2, "training/loss", 2.5),
        (2, "training/learning_rate", 0.125),
    ]


@pytest.mark.needs("wandb")
def test_wandb_goes_on_with_its_run(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for after in (0, 1):
        with logs.opened(["wandb"], tmp_path, ABOUT, after) as log:
            for row in ROWS[after:]:
                log(row)
    names = {path.stem.removeprefix("run-") for path in tmp_path.rglob("run-*.wandb")}
    assert names == {(tmp_path / "wandb" / "run-id").read_text()}


def test_without_logs_nothing_is_written_and_none_is_imported(tmp_path, monkeypatch):
    monkeypatch.setattr(logs, "find_spec", lambda name: None)
    with logs.opened([], tmp_path, ABOUT) as log:
        log(ROWS[0])
    logs.check(())
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OptionError) as refused:
        logs.check(["wandb"])
    assert str(refused.value) == (
        "log wandb needs the package wandb: `pip install 'openelm-mlx[wandb]'`, or leave wandb out "
        "of log"
    )
    with pytest.raises(OptionError, match="needs the package tensorboardX: `pip install 'openelm-"):
        logs.check(["tensorboard"])


@pytest.mark.needs("wandb")
def test_wandb_without_an_account_says_what_to_do(tmp_path, monkeypatch):
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with (
        pytest.raises(OptionError, match=r"log wandb cannot be started \(.*\); run `wandb login`"),
        logs.opened(["wandb"], tmp_path, ABOUT),
    ):
        pass
