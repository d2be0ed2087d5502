"""The memory that a conversion is said to need, against what MLX counts while it works."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from conversion_memory import write_model
from formats import TINY

from openelm_mlx.cli.display import rough
from openelm_mlx.convert import ConvertOptions, activations, convert, estimate
from openelm_mlx.convert.activations import activation_text
from openelm_mlx.convert.estimate import FREED, memory_needed, memory_steps
from openelm_mlx.convert.opening import open_model
from openelm_mlx.convert.quantize import losses
from openelm_mlx.convert.verify import verification_text
from openelm_mlx.device import mx

SHAPE = replace(
    TINY,
    model_dim=256,
    head_dim=64,
    num_transformer_layers=2,
    vocab_size=4096,
    max_context_length=128,
    ffn_multipliers=(1.0, 4.0),
    qkv_multipliers=(0.5, 1.0),
)
STEPS = {  # how progress begins -> the step that it tells of
    "measuring layer": "measuring layers",
    "measuring the loss": "measuring losses",
    "verifying layer": "verifying layers",
    "verifying logits": "verifying losses",
    "measuring activations, layer": "measuring activations",
    "measuring activations, logits": "measuring logits",
}


def peaks_of(options: ConvertOptions) -> Counter[str]:
    """Convert, and return the most memory of each step."""
    peaks: Counter[str] = Counter()

    def watch(done: int, total: int, what: str) -> None:
        for start, step in STEPS.items():
            if what.startswith(start) and not what.endswith("layer 0"):  # which comes after more
                peaks[step] = max(peaks[step], mx.get_peak_memory() - before)
        mx.reset_peak_memory()

    mx.reset_peak_memory()
    before = mx.get_active_memory()
    convert(options, watch)
    return peaks


def test_every_step_takes_what_is_said_and_not_much_less(tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "ROWS", 32)  # whose rounding errors are taken, which is not watched
    folder = write_model(tmp_path / "source", SHAPE, "bfloat16")
    text = tmp_path / "text.txt"
    text.write_text("once upon a time there was a girl who lived in a forest with a fox " * 9)
    options = ConvertOptions(
        folder, tmp_path / "m", target_bpw=8.5, calibration_text=text, verify_text=text
    )
    opened = open_model(options)
    said = convert(replace(options, dry_run=True))
    texts = verification_text(opened, text)
    steps = memory_steps(opened, options, said.written_bytes, texts)
    assert said.memory_bytes == memory_needed(steps)
    peaks = peaks_of(options)
    assert len(peaks) == 4
    needs = {step: sum(steps[step].values()) - FREED for step in peaks}
    shares = {step: peaks[step] / need for step, need in needs.items()}
    assert all(0.4 < share <= 1.0 for share in shares.values()), (shares, needs)


def test_measuring_activations_takes_what_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(activations, "TOKENS", 500)
    folder = write_model(tmp_path / "source", SHAPE, "float32")
    options = ConvertOptions(folder, tmp_path / "m")
    opened = open_model(options)
    steps = memory_steps(opened, options, 0, activations=activation_text(opened))
    peaks = peaks_of(options)
    needs = {step: sum(steps[step].values()) - FREED for step in peaks}
    shares = {step: peaks[step] / need for step, need in needs.items()}
    assert len(shares) == 2 and all(0.4 < share <= 1.0 for share in shares.values()), shares


def test_more_work_is_said_to_take_longer(tmp_path, monkeypatch):
    folder, rates = write_model(tmp_path / "source", SHAPE, "bfloat16"), estimate.Rates()
    monkeypatch.setattr(estimate, "Rates", lambda: rates)
    work: list[dict[str, Any]] = [
        {},
        {"bits": 4},
        {"bits": 4, "verify": True},
        {"target_bpw": 4.5, "verify": True},
        {"target_bpw": 4.5, "verify": True, "calibrate": "gptq"},
        {"target_bpw": 4.5, "verify": True, "calibrate": "distill"},
    ]
    said = [
        convert(ConvertOptions(folder, tmp_path / "m", dry_run=True, **fields)).seconds
        for fields in work
    ]
    assert said == sorted(said) and 0 < said[0] < said[-1]
    assert rates.keys() == rates.work.keys()
    assert all(0 < rate < 1e-3 for rate in rates.values())
    assert [rough(s) for s in (0.2, 119, 121, 7300)] == [
        *("a second", "119 seconds", "2 minutes", "2 hours"),
    ]
