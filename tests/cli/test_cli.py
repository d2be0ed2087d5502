from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from formats import TINY, WIDE, again, random_folder
from optional import compiles
from started import help_of

from openelm_mlx.cli import COMMANDS, main
from openelm_mlx.cli.doctor import caches, hints
from openelm_mlx.cli.inspect import inspect, room_text
from openelm_mlx.device import facts


def run(*args, **settings):
    return subprocess.run(
        [sys.executable, "-m", "openelm_mlx", *args],
        capture_output=True,
        text=True,
        timeout=60,
        **settings,
    )


def test_help_loads_neither_engine_nor_hub():
    shown, modules = help_of()
    assert not modules & {"mlx", "mlx.core", "huggingface_hub", "numpy", "rich"}
    assert "openelm_mlx.cli" in modules and all(name in shown for name in COMMANDS)


def test_generate_prints_text_on_stdout_and_the_rest_on_stderr():
    plain = run("generate", "Once upon a time", "--max-tokens", "8")
    piped = run("generate", "-", "--max-tokens", "8", "--json", input="Once upon a time")
    result = json.loads(piped.stdout)
    assert plain.returncode == piped.returncode == 0
    assert plain.stdout == result["text"] + "\n" and "tokens/s" in plain.stderr
    assert (
        len(result["tokens"]) == 8 == result["stats"]["generation_tokens"]
        and result["finish_reason"] == "length"
    )


def test_speculation_and_a_cache_file_change_the_cost_only(tmp_path, capsys):
    common = ["generate", "Once upon a time", "--max-tokens", "8", "--json"]
    cache = ["--cache-file", str(tmp_path / "talk.safetensors")]
    results = []
    for flags in ([], ["--draft-model", "openelm-tiny"], ["--prompt-lookup", "2", *cache], cache):
        assert main([*common, *flags]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert len({result["text"] for result in results}) == 1
    assert results[1]["stats"]["accepted_tokens"] and results[1]["stats"]["target_passes"] < 7
    assert results[3]["stats"]["reused_tokens"] == results[3]["stats"]["prompt_tokens"] - 1
    assert (
        main([*common, *cache, "--kv-bits", "8"]) == 2
        and "Give the same options" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("args", "text"),
    [
        (["generate", ""], "the prompt is empty"),
        (["generate", "x", "--model", "270n"], "did you mean"),
        (["generate", "x", "--temperature", "-1"], "temperature is -1.0; allowed"),
        (["convert", "no-such.pt", "-o", "x"], "no-such.pt does not exist"),
        (["convert", "openelm-tiny", "-o", "x.gguf", "--to", "mlx"], "leave out --to, or choose"),
        (["inspect", "270x"], "did you mean"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(args, text, capsys):
    assert main(args) == 2
    error = capsys.readouterr().err
    assert error.startswith("openelm: ") and text in error and error.count("\n") == 1


def test_flags_of_every_class_reach_the_engine(tiny, tmp_path, capsys):
    """A bias and a stop token act; options of the engine change the cost only."""
    common = ["generate", "Once upon a time", "--max-tokens", "8", "--json"]

    def tokens(*flags):
        assert main([*common, *flags]) == 0
        return json.loads(capsys.readouterr().out)["tokens"]

    plain = tokens()
    assert (
        plain
        == tokens("--prefill-chunk", "2", "--no-compiled")
        == tokens("--kv-window", "200", "--kv-keep", "2")
    )
    third = plain[2]
    assert (
        tokens("--stop-token", "3", "--stop-token", str(third)) == plain[: plain.index(third) + 1]
    )
    assert third not in tokens("--logit-bias", f"{third}=-100", "--logit-bias", "3=-1")
    drawn = ["--temperature", "1", "--seed", "4", "--repetition-penalty", "1.5"]
    others = (["--penalty-window", "3"], ["--xtc-probability", "1", "--xtc-threshold", "0.01"])
    assert len({tuple(tokens(*drawn, *flags)) for flags in ([], *others)}) == 3


def test_a_reader_that_leaves_early_ends_the_command_in_silence(monkeypatch, capfd):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as gone:
        monkeypatch.setattr(sys, "stdout", gone)
        status = main(["inspect", "270m", "--json"])
    assert status in (0, 141) and capfd.readouterr().err == ""


def test_inspect(tiny, capsys):
    assert main(["inspect", "1.1b"]) == 0
    shown = capsys.readouterr().out
    assert "1,079,891,456" in shown and shown.count("│ ") > 28
    bundled = inspect("openelm-tiny")
    assert (
        bundled["bytes"]
        == tiny.nbytes
        == bundled["bytes_read_per_token"]
        == sum(bundled["bytes_by_part"].values())
    )


def test_inspect_plans_for_macs_of_8_and_16_gigabytes(capsys):
    assert main(["inspect", "3b"]) == 0
    shown = capsys.readouterr().out
    room = "7.0 of 5.7 GB; with --bits 8 4.8 GB, prompts in chunks of 256"
    assert f"on a Mac of 8 GB    does not fit: {room}\n" in shown
    assert "on a Mac of 16 GB   fits: 8.5 of 11.5 GB, prompts in chunks of 512\n" in shown
    assert "not measured on a Mac" in shown
    small, large = inspect("3b")["macs"]
    assert small["needs_bytes"] == sum(small["needs"].values()) > small["recommended_bytes"]
    assert not small["fits"] and small["fits_with"]["bits"] == 8
    assert large["fits"] and large["needs"]["weights"] == 2 * 3_036_647_424
    assert "no options make it" in room_text(small | {"fits_with": None})
    with_cache = small["fits_with"] | {"bits": None, "kv_bits": 8}
    assert "with --kv-bits 8 4.8" in room_text(small | {"fits_with": with_cache})


def test_a_plan_counts_the_types_of_a_mac(tmp_path, monkeypatch):
    source = random_folder(tmp_path / "m", WIDE)
    half = again(source, tmp_path / "half", dtype="float16")
    quantized = again(source, tmp_path / "quantized", bits=8)
    needs = [inspect(str(folder))["macs"][0]["needs"] for folder in (source, half, quantized)]
    assert needs[0] == needs[1] and needs[2]["weights"] < 0.6 * needs[1]["weights"]
    for folder, takes, bits in ((half, needs[1], 8), (quantized, needs[2], None)):
        least = sum(takes.values()) - takes["activations"] * 7 // 8  # in chunks of 64, not 512
        memory = 3 * least // 2 - 3  # two thirds are a little less
        monkeypatch.setattr("openelm_mlx.cli.inspect.MACS", (memory,))
        (mac,) = inspect(str(folder))["macs"]
        assert not mac["fits"] and (mac["fits_with"] or {}).get("bits") == bits


def test_of_an_untied_embedding_a_token_reads_one_row(tmp_path):
    config = replace(TINY, share_input_output_layers=False)
    found = inspect(str(random_folder(tmp_path / "m", config)))
    table = 4 * config.vocab_size * config.model_dim
    assert found["bytes_by_part"]["embedding"] == found["bytes_by_part"]["head"] == table
    assert found["bytes_read_per_token"] == found["bytes"] - table + 4 * config.model_dim


@pytest.mark.with_or_without("OpenBLAS", "a C++ compiler", "a writable home")
def test_doctor(capsys, monkeypatch):
    monkeypatch.setattr("openelm_mlx.benchmarks.doctor.self_test.WAYS", ())
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["facts"]
    assert found["self_test"].startswith("16 of 16 ")
    assert found["backend"] != "cpu" or (found["cxx_compiler"] is not None) == compiles()
    assert found["backend"] in ("metal", "cuda", "cpu") and found["memory_bytes"] > 0
    good = {
        "system": "Darwin",
        "machine": "arm64",
        "blas": "x",
        "backend": "metal",
        "cxx_compiler": None,
        "cores": 8,
        "load_average": 1.0,
        "memory_bytes": 16e9,
        "free_disk_bytes": 100e9,
    }
    assert hints(good) == [] and set(good) <= set(facts() | caches())
    slow = good | {
        "system": "Linux",
        "blas": "MLX's own",
        "backend": "cpu",
        "load_average": 9.0,
        "memory_bytes": 8 << 30,
    }
    assert [
        any(word in hint for hint in hints(slow))
        for word in ("OPENELM_BLAS", "g++", "busy", "4-bit")
    ] == [True] * 4
    assert "Rosetta" in hints(good | {"machine": "x86_64"})[0]
    gpu = good | {"system": "Linux", "nvidia_gpu": "NVIDIA H100, 580.1, 81559 MiB"}
    fast = gpu | {"backend": "cuda", "blas": "MLX's own", "gpu_memory_bytes": 80e9}
    assert hints(fast) == [] and "4-bit" in hints(fast | {"gpu_memory_bytes": 6e9})[0]
    beside = gpu | {"backend": "cpu", "cxx_compiler": "/usr/bin/g++"}
    assert hints(beside) == [
        "MLX computes on the processor beside a GPU (NVIDIA H100, 580.1, 81559 MiB); install the "
        "extra cuda13 or cuda12 (docs/install.md)"
    ]
    assert hints(beside | {"mlx_mixture": "one over the other"}) == ["one over the other"]
