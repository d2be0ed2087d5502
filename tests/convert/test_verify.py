"""Verification: figures against hand-made models, the bound, the record, and a dry run that touches
nothing.
"""

from __future__ import annotations

import hashlib
import json
import math

import pytest
from formats import again, random_folder
from golden_set import NANO

from openelm_mlx.cli import main
from openelm_mlx.convert import ConvertOptions, convert
from openelm_mlx.convert.record import command_line
from openelm_mlx.convert.verify import check_bound
from openelm_mlx.errors import ConversionError, OptionError

SOURCE = NANO / "checkpoint.pt"


def short_text(folder):
    """Write a text of 50 tokens, for tests that ask for figures and not for good ones."""
    path = folder / "mine.txt"
    path.write_text("Once upon a time there was a fox. " * 5)
    return path


def test_bound():
    losses = {"tokens": 2806, "mean_kl_divergence": 0.1, "intervals_95": {}}
    check_bound(losses, None)
    check_bound(losses, 0.1)
    with pytest.raises(
        ConversionError, match="is nan nats, above --max-kl 0.1; nothing was written"
    ):
        check_bound(losses | {"mean_kl_divergence": math.nan}, 0.1)
    losses |= {"mean_kl_divergence": 0.2, "intervals_95": {"mean_kl_divergence": [0.09, 0.34567]}}
    with pytest.raises(
        ConversionError,
        match=r"^the mean KL divergence over 2,806 tokens is 0.2 \(95 %: 0.09 to 0.346\) nats, "
        "above --max-kl 0.1; nothing was written: take more bits",
    ):
        check_bound(losses, 0.1)


@pytest.mark.parametrize(
    ("target", "flags", "message"),
    [
        ("m", "--bits 2 --max-kl 0.01", "above --max-kl 0.01; nothing was written: take more bits"),
        (
            "a/x.gguf",
            "--to gguf --bits 8 --max-kl 0",
            "above --max-kl 0; nothing was written: take more bits (--gguf-type), or",
        ),
    ],
)
def test_above_the_bound_nothing_is_left_and_the_status_is_2(
    tmp_path, capsys, target, flags, message
):
    command = ["convert", str(SOURCE), *flags.split(), "-o", str(tmp_path / target)]
    assert main([*command, "--verify-text", str(short_text(tmp_path))]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_above_the_bound_without_quantization_the_remedy_is_float32(tmp_path):
    text = short_text(tmp_path)
    options = {"dtype": "bfloat16", "max_kl": 0.0, "verify_text": text}
    with pytest.raises(ConversionError, match="nothing was written: take --dtype float32$"):
        again(random_folder(tmp_path / "source"), tmp_path / "m", **options)


@pytest.mark.parametrize("spread", [1e3, 1e30])  # perplexities, states
def test_numbers_that_overflow_are_told_and_no_proof(tmp_path, spread):
    source = random_folder(tmp_path / "source", spread=spread)
    with pytest.raises(
        ConversionError,
        match="^the source computes numbers that overflow: these are no trained weights, and "
        "nothing can be verified; nothing was written: leave out --verify to convert them all the",
    ):
        again(source, tmp_path / "m", verify_text=short_text(tmp_path))
    assert not (tmp_path / "m").exists()


def test_losses_and_origin_are_recorded(tmp_path):
    text = short_text(tmp_path)
    report = convert(ConvertOptions(SOURCE, tmp_path / "m", bits=8, verify_text=text, max_kl=0.1))
    record = json.loads((tmp_path / "m" / "conversion.json").read_text())
    assert record["verification"] == report.verification and report.verification["tokens"] > 30
    assert record["source_sha256"] == {
        "checkpoint.pt": hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    }
    assert (
        record["command"]
        == "openelm convert checkpoint.pt -o m --bits 8 --verify-text mine.txt --max-kl 0.1"
    )
    assert record["bytes"] == report.written_bytes and set(record["versions"]) == {"mlx", "python"}
    card = (tmp_path / "m" / "README.md").read_text()
    assert (
        "on mine.txt:" in card
        and f"{report.verification['mean_kl_divergence']:.6g}" in card
        and record["command"] in card
    )
    assert record["source_sha256"]["checkpoint.pt"] in card


@pytest.mark.parametrize("target_format", ["mlx", "gguf"])
@pytest.mark.parametrize("content", [b"", b"\xff"])
def test_texts_that_cannot_be_verified_on(content, target_format, tmp_path):
    path = tmp_path / "text"
    path.write_bytes(content)
    with pytest.raises(
        (ConversionError, OptionError),
        match="text (has no text|cannot be read as UTF-8)",
    ):
        convert(
            ConvertOptions(SOURCE, tmp_path / "m", target_format=target_format, verify_text=path)
        )
    assert list(tmp_path.iterdir()) == [path]


def test_a_dry_run_shows_and_writes_nothing(tmp_path, capsys):

    assert main(
        [
            "convert",
            str(SOURCE),
            "-o",
            str(tmp_path / "a" / "m"),
            "--recipe",
            "mixed-3-4",
            "--dtype",
            "float16",
            "--dry-run",
        ]
    ) in (0, None)
    shown = capsys.readouterr().out
    assert (
        "layer 3" in shown
        and "4/128" in shown
        and "memory needed: about" in shown
        and "nothing was written" in shown
    )
    assert list(tmp_path.iterdir()) == []
    written = convert(
        ConvertOptions(SOURCE, tmp_path / "m", recipe="mixed-3-4", dtype="float16")
    ).written_bytes
    assert f"{written:,} bytes" in shown


def test_json_of_a_conversion_is_what_its_record_says(tmp_path, capsys):

    command = ["convert", str(SOURCE), "-o", str(tmp_path / "m"), "--bits", "4", "--json"]
    assert main([*command, "--dry-run"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert (
        planned["written"] is False
        and planned["verification"] is None
        and not (tmp_path / "m").exists()
    )
    assert main([*command, "--verify-text", str(short_text(tmp_path))]) == 0
    told = json.loads(capsys.readouterr().out)
    record = json.loads((tmp_path / "m" / "conversion.json").read_text())
    shared = ("parameters", "bytes", "dropped_embedding_rows", "quantization", "verification")
    assert {key: told[key] for key in shared} == {key: record[key] for key in shared}
    assert told["target"] == str(tmp_path / "m") and told["bits_per_weight"] == pytest.approx(
        record["bits_per_weight"], abs=1e-4
    )
    assert planned == {
        **told,
        "written": False,
        "activations": {},
        "verification": None,
        "memory_bytes": planned["memory_bytes"],
        "estimated_seconds": planned["estimated_seconds"],
    }
    assert (
        main(
            [
                "convert",
                str(SOURCE),
                "-o",
                str(tmp_path / "m.gguf"),
                "--to",
                "gguf",
                "--bits",
                "8",
                "--json",
            ]
        )
        == 0
    )
    told = json.loads(capsys.readouterr().out)
    assert "quantization" not in told and 8 < told["bits_per_weight"] < 10


def test_the_command_is_written_as_it_would_be_typed():
    options = ConvertOptions(
        "/x/a b.pt", "/y/m", instruct=False, target_bpw=3.5, calibrate="gptq", recipe=None
    )
    assert (
        command_line(options)
        == "openelm convert 'a b.pt' -o m --target-bpw 3.5 --calibrate gptq --no-instruct"
    )
    assert "--to hf" in command_line(ConvertOptions("a", "b", target_format="hf"))
