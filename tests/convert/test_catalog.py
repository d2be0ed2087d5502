"""Every name Apple published leads to its file, and from there to a model folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from golden_set import GOLDEN, NANO
from range_server import serving

from openelm_mlx import load
from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.convert import fetch as catalog
from openelm_mlx.convert.fetch import CATALOG, ROOT, cache_folder, fetch_published
from openelm_mlx.device import mx
from openelm_mlx.engine.hub import is_published
from openelm_mlx.errors import HubError


def test_every_published_file_has_its_name():
    """apple/corenet: README-pretraining.md, README-peft.md and mlx_examples/open_elm/README.md."""
    addresses = {ROOT + path for entry in CATALOG.values() for path, _ in entry.files}
    base = "https://docs-assets.developer.apple.com/ml-research/models/corenet/v0.1.0/openelm/"
    for path in (
        "pretrained/270M/checkpoint_average.pt",
        "pretrained/1.1B/checkpoint_epoch_0_iter_49999.pt",
        "pretrained/3B/checkpoint_epoch_0_iter_334999.pt",
        "pretrained/450M/training_checkpoint_last.pt",
        "pretrained/1.1B/training_checkpoint_epoch_0_iter_149999.pt",
        "peft/openelm_lora_1.1B.pt",
        "peft/openelm_dora_3B.pt",
        "mlx/450M-4bit/weights.safetensors",
        "mlx/270M/config.json",
    ):
        assert base + path in addresses
    assert {
        "corenet:270m",
        "corenet:1.1b-lora",
        "corenet-mlx:3b-4bit",
        "corenet:450m@350k",
        "corenet:450m-training",
        "corenet:1.1b-training@150k",
    } <= CATALOG.keys()
    # all of CoreNet's addresses but those of the four logs of training
    assert len(addresses) == 124 - 4 and len(CATALOG) == 4 * (1 + 11 + 12 + 2 + 2)
    assert is_published("CoreNet:270M") and not is_published("apple/OpenELM-270M")


def test_a_name_apple_did_not_publish(tmp_path):
    with pytest.raises(
        HubError,
        match="'corenet:270m-lore' is not a name of weights .*; did you mean corenet:270m-lora",
    ):
        fetch_published("corenet:270m-lore", cache=tmp_path)


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("OPENELM_CACHE", "/x/y")
    assert cache_folder() == Path("/x/y")
    monkeypatch.delenv("OPENELM_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/z")
    assert cache_folder() == Path("/z/openelm-mlx")


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        HubError, match="cannot be written: .*; set OPENELM_CACHE to another folder"
    ):
        fetch_published("corenet:270m", cache=tmp_path / "file")


def test_a_length_that_is_too_short_shows_in_the_file(tmp_path):
    checkpoint = (NANO / "checkpoint.pt").read_bytes()

    def lie(handler, number):
        handler.answer(checkpoint, length=1_000_000, sent=1_000_000)
        return True

    with (
        serving({}, lie) as server,
        pytest.raises(HubError, match="_average.pt sent is not kept: .* is truncated"),
    ):
        fetch_published("corenet:270m", cache=tmp_path, root=server.url + "/")
    assert not list(tmp_path.rglob("checkpoint.pt")) and not list(tmp_path.rglob("*.record.json"))


def test_a_name_becomes_a_model_folder(tmp_path):
    """The LoRA checkpoint of the catalog, served from here: its YAML comes with it, alpha / r = 32
    / 32.
    """
    from openelm_mlx.convert.sources.corenet_adapters import LoraOptions, corenet_adapter
    from openelm_mlx.convert.sources.torch_pt import TorchCheckpoint

    path = GOLDEN / "lora" / "checkpoint.pt"
    with serving({"/peft/openelm_lora_1.1B.pt": path.read_bytes()}) as server:
        source = fetch_published("corenet:1.1b-lora", cache=tmp_path, root=server.url + "/")
    assert (
        source == tmp_path / "corenet-1.1b-lora" / "checkpoint.pt"
        and source.read_bytes() == path.read_bytes()
    )
    yaml = (
        source.with_name("config.yaml")
        .read_text()
        .replace("r: 32, lora_alpha: 32", "r: 8, lora_alpha: 8")
    )
    source.with_name("config.yaml").write_text(yaml)
    adapter = corenet_adapter(
        TorchCheckpoint(source), LoraOptions(yaml=source.with_name("config.yaml"))
    )
    assert {part.scale for part in adapter.parts.values()} == {1.0}


def test_a_name_is_a_model(nano, tmp_path, monkeypatch, capsys):
    """CoreNet's folder for MLX, served from here; once it is converted, neither server nor download
    is needed.
    """
    monkeypatch.setenv("OPENELM_CACHE", str(tmp_path))
    (nano_config := tmp_path / "c.json").write_text(
        json.dumps({"model_name": "nano", "max_context_length": 512})
    )
    tokens, files = (
        mx.array([[1, 5, 9]]),
        {"config.json": nano_config, "weights.safetensors": nano / "model.safetensors"},
    )
    with serving(
        {f"/mlx/450M/{name}": path.read_bytes() for name, path in files.items()}
    ) as server:
        monkeypatch.setattr(catalog, "ROOT", server.url + "/")
        engine = load("corenet-mlx:450m", tokenizer=NANO / "tokenizer.model")
    assert (
        mx.array_equal(engine.model(tokens), load(nano).model(tokens))
        and engine.name == "corenet-mlx:450m"
    )
    assert (
        "to keep it: openelm convert corenet-mlx:450m -o FOLDER --tokenizer "
        in capsys.readouterr().err
    )
    os.utime(
        tmp_path / "corenet-mlx-450m" / "weights.safetensors", (1, 1)
    )  # so that it counts as settled
    os.utime(tmp_path / "corenet-mlx-450m" / "config.json", (1, 1))
    assert fetch_published("corenet-mlx:450m") == tmp_path / "corenet-mlx-450m"
    again = load("CoreNet-MLX:450M", tokenizer=NANO / "tokenizer.model")
    assert again.path == engine.path and capsys.readouterr().err == ""
    (
        tmp_path / "corenet-mlx-450m" / "config.json.record.json"
    ).unlink()  # without it the file would be fetched again
    assert load("corenet-mlx:450m", tokenizer=NANO / "tokenizer.model").path == engine.path


def test_convert_by_name_on_the_command_line(tmp_path):
    """`openelm convert corenet:270m` in a process of its own, with Apple's server stood in for."""
    code = (
        "import sys; from openelm_mlx.convert import fetch; fetch.ROOT = sys.argv.pop(1)\n"
        "from openelm_mlx.cli import main; sys.exit(main())"
    )
    (tmp_path / "y.yaml").write_text((NANO / "config.yaml").read_text())
    command = [sys.executable, "-c", code]
    arguments = [
        "convert",
        "corenet:270m",
        "-o",
        tmp_path / "m",
        "--tokenizer",
        NANO / "tokenizer.model",
        "--config",
        tmp_path / "y.yaml",
    ]
    environment = {**os.environ, "OPENELM_CACHE": str(tmp_path / "cache")}
    with serving(
        {"/pretrained/270M/checkpoint_average.pt": (NANO / "checkpoint.pt").read_bytes()}
    ) as server:
        run = subprocess.run(
            [*command, server.url + "/", *arguments],
            capture_output=True,
            text=True,
            env=environment,
        )
        again = subprocess.run(
            [*command, server.url + "/", *arguments],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert len(server.requests) == 1
    assert run.returncode == 0, run.stderr
    assert (
        again.returncode == 2
        and "exists; choose another folder, or replace it with --force" in again.stderr
    )
    record = json.loads((tmp_path / "m" / "conversion.json").read_text())
    assert record["source"] == "corenet:270m" and record["command"].startswith(
        "openelm convert corenet:270m -o m"
    )
    convert(ConvertOptions(source=NANO / "checkpoint.pt", target=tmp_path / "same"))
    assert (tmp_path / "m" / "model.safetensors").read_bytes() == (
        tmp_path / "same" / "model.safetensors"
    ).read_bytes()
