"""What a model needs, what is chosen by it, and what the process keeps, on a Mac that is not here.

MLX's own functions are replaced where they set something on Metal: the CPU backend has no wired
limit, and keeps no memory worth giving back.
"""

from __future__ import annotations

import gc
import math
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.formats import WIDE, random_folder
from helpers.small import random_engine
from helpers.training import options, small_engine, write_pairs

from openelm_mlx import batch_generate, device, generate, load
from openelm_mlx.device import mx
from openelm_mlx.engine import scheduler
from openelm_mlx.engine.admission import Admission
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.memory import (
    CHUNKS,
    KEPT,
    Wired,
    check_fits,
    needs,
    plan,
    prefill_chunk,
    recommended_by_metal,
)
from openelm_mlx.engine.options import EngineOptions
from openelm_mlx.engine.scheduler import BatchEngine
from openelm_mlx.errors import OptionError
from openelm_mlx.finetune import finetune
from openelm_mlx.model.cache import KVCache
from openelm_mlx.model.cache_kinds import CacheKind
from openelm_mlx.model.config import OpenELMConfig, expected_tensors
from openelm_mlx.quantization import QuantSpec

GB = 1 << 30
LARGER = replace(WIDE, num_transformer_layers=12)
PLAIN = CacheKind()


def weights_of(config: OpenELMConfig) -> dict[int | None, int]:
    """Return the bytes of a model in bfloat16, and at 8 and 4 bits."""
    shapes = expected_tensors(config).values()
    found: dict[int | None, int] = {None: sum(2 * math.prod(shape) for shape in shapes)}
    for bits in (8, 4):
        spec = QuantSpec(bits, 64)
        sizes = (spec.nbytes(s, "bfloat16") if len(s) == 2 else 2 * math.prod(s) for s in shapes)
        found[bits] = sum(sizes)
    return found


@pytest.mark.parametrize(
    ("size", "bits", "gigabytes", "chunk"),
    [
        ("270m", None, 8, 512),
        ("1.1b", None, 8, 512),
        ("3b", 4, 8, 256),
        ("3b", 8, 8, 256),
        ("3b", None, 8, 64),  # it does not fit, so the least is taken
        ("3b", None, 16, 512),
        ("3b", 4, 16, 512),
    ],
)
def test_a_chunk_that_fits(size: str, bits: int | None, gigabytes: int, chunk: int) -> None:
    config = OpenELMConfig.from_name(size)
    weights, available = weights_of(config)[bits], recommended_by_metal(gigabytes * GB)
    assert prefill_chunk(config, weights, PLAIN, 2, available) == chunk
    rest = available - needs(config, weights, PLAIN, 0).total
    larger = needs(config, weights, PLAIN, 2 * chunk).activations
    assert chunk == CHUNKS[0] or larger > rest / 2


@pytest.mark.parametrize("options", [{}, {"kv_bits": 8}, {"kv_window": 24}])
def test_keys_and_values_of_a_full_context(tiny: Engine, options: dict[str, Any]) -> None:
    config, kind = tiny.config, CacheKind.of(tiny.config, EngineOptions(**options))
    cache = KVCache(config, kind)
    tiny.model.hidden(mx.zeros((1, config.max_context_length), mx.int32), cache)
    assert needs(config, 0, kind, 0, itemsize=4).cache == cache.nbytes


def test_a_quantized_cache_needs_room_for_scores() -> None:
    config = OpenELMConfig.from_name("3b")
    quantized = CacheKind.of(config, EngineOptions(kv_bits=8))
    plain, other = (needs(config, 0, kind, 512) for kind in (PLAIN, quantized))
    assert other.cache < plain.cache and other.activations > plain.activations


def test_the_3b_on_8_and_16_gigabytes() -> None:
    config = OpenELMConfig.from_name("3b")
    weights = weights_of(config)
    small, large = (plan(config, weights, size * GB) for size in (8, 16))
    assert small.plain.needs.total > small.available == 5_726_623_061
    assert small.fitting is not None and small.fitting[:3] == (8, None, 256)
    assert large.fitting == large.plain and large.plain[:3] == (None, None, 512)
    assert plan(config, weights, GB).fitting is None


def test_a_quantized_cache_can_be_what_makes_a_model_fit() -> None:
    config, available = OpenELMConfig.from_name("3b"), recommended_by_metal(8 * GB)
    rest = needs(config, 0, PLAIN, CHUNKS[-1]).total
    found = plan(config, {None: available - rest + 1}, 8 * GB)
    assert found.plain.needs.total == available + 1
    assert found.fitting is not None and found.fitting[:3] == (None, 8, 64)


def test_a_model_that_cannot_fit_is_refused_or_warned_about() -> None:
    config = OpenELMConfig.from_name("3b")
    how: Any = ("openelm-3b", config, weights_of(config)[None])
    assert check_fits(*how, False, 16 * GB, recommended_by_metal(16 * GB)) is None
    warning = check_fits(*how, False, 8 * GB, recommended_by_metal(8 * GB))
    assert warning == (
        "openelm-3b needs about 7.0 GB, and 5.7 GB are recommended on this device; the system may "
        "swap: use --bits 4 (about 1.7 GB) or a smaller model"
    )
    with pytest.raises(OptionError) as error:
        check_fits(*how, True, 4 * GB, recommended_by_metal(4 * GB))
    assert str(error.value) == (
        "the weights of openelm-3b take 6.1 GB, and there are 4.3 GB of memory; "
        "use fewer bits or a smaller model"
    )


def test_loading_asks_whether_a_model_fits(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(device, "kind", lambda: "cpu")
    monkeypatch.setattr(device, "memory_bytes", lambda: 1000)
    with pytest.raises(OptionError, match="the weights of openelm-tiny take 0.0 GB"):
        load("openelm-tiny")
    monkeypatch.setattr(device, "memory_bytes", lambda: 100 << 20)
    load("openelm-tiny")
    assert "openelm-tiny needs about 0.6 GB, and 0.1 GB are recommended" in caplog.text


def test_nothing_is_read_of_a_model_that_cannot_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = random_folder(tmp_path / "m", LARGER)
    monkeypatch.setattr(device, "kind", lambda: "cpu")
    monkeypatch.setattr(device, "memory_bytes", lambda: 1000)
    mx.reset_peak_memory()
    with pytest.raises(OptionError, match=r"use --bits 4 \(about"):
        load(folder)
    assert mx.get_peak_memory() - mx.get_active_memory() < 1000


def test_weights_are_quantized_a_layer_at_a_time(tmp_path: Path) -> None:
    folder = random_folder(tmp_path / "m", LARGER)
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    engine = load(folder, bits=4)
    peak, whole = mx.get_peak_memory() - before, 4 * engine.config.num_parameters
    embedding = 4 * engine.config.vocab_size * engine.config.model_dim
    layer = (whole - embedding) / engine.config.num_transformer_layers
    assert peak < engine.nbytes + max(2 * layer, 1.5 * embedding) < whole


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The wired limits that are set on a Mac with 1 GB to recommend; the one found is 7."""
    found = [7]

    def set_limit(limit: int) -> int:
        found.append(limit)
        return found[-2]

    monkeypatch.setattr(device, "kind", lambda: "metal")
    facts = {"max_recommended_working_set_size": GB}
    monkeypatch.setattr(mx, "device_info", lambda *device: facts)
    monkeypatch.setattr(mx, "set_wired_limit", set_limit)
    monkeypatch.setattr(platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(scheduler, "wired", Wired())
    return found


class Owner:
    """Whoever generates."""


def test_weights_that_several_hold_count_once(tiny: Engine, limits: list[int]) -> None:
    wired, (one, other) = Wired(), (Owner(), Owner())
    cache = needs(tiny.config, 0, PLAIN, 0, itemsize=4).cache
    wired.hold(one, [tiny], PLAIN, 1)
    assert limits == [7, 0, tiny.nbytes + cache + KEPT]
    wired.hold(other, [tiny], PLAIN, 3)
    assert limits[-1] == tiny.nbytes + 4 * cache + KEPT
    wired.release(one)
    assert limits[-1] == tiny.nbytes + 3 * cache + KEPT
    wired.release(one)  # it holds nothing any more
    wired.release(other)
    assert limits[-1] == 7 and len(limits) == 6


def test_no_more_is_wired_than_metal_recommends(tiny: Engine, limits: list[int]) -> None:
    wired, dropped = Wired(), Owner()
    wired.hold(dropped, [tiny], PLAIN, 10_000)
    assert limits[-1] == GB
    del dropped
    gc.collect()
    owner = Owner()
    wired.hold(owner, [random_engine(tiny, 1)], PLAIN, 1)
    assert limits[-1] < GB


def test_a_higher_limit_of_the_program_stays(tiny: Engine, limits: list[int]) -> None:
    wired, owner = Wired(), Owner()
    limits[0] = GB - 1
    wired.hold(owner, [tiny], PLAIN, 1)
    assert limits[-1] == GB - 1


@pytest.mark.parametrize("version", ["14.7", ""])
def test_an_older_macos_has_nothing_wired(
    tiny: Engine, limits: list[int], monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    monkeypatch.setattr(platform, "mac_ver", lambda: (version, ("", "", ""), "arm64"))
    assert generate(tiny, "Once", max_tokens=2) and limits == [7]


def test_memory_is_wired_only_while_something_runs(tiny: Engine, limits: list[int]) -> None:
    batch = BatchEngine(tiny, 2)
    assert limits == [7]
    batch.submit("Once", max_tokens=3)
    batch.step()
    held = limits[-1]
    assert held > tiny.nbytes + KEPT
    generate(tiny, "Twice", max_tokens=2)  # beside it, and shorter
    assert limits[-1] == held
    while batch.busy:
        batch.step()
    assert limits[-1] == 7
    one, other = (batch.submit(text, max_tokens=3) for text in ("Once", "Twice upon a time"))
    batch.step()
    assert limits[-1] == held
    assert batch.cancel(one) and limits[-1] == held
    assert batch.cancel(other) and limits[-1] == 7  # nobody may ask for another step
    batch.submit("Once", max_tokens=3)
    batch.step()
    assert limits[-1] == held
    batch.close()
    assert limits[-1] == 7


def test_freed_memory_is_given_back_after_a_prompt(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    cleared: list[int] = []
    kept, recommended = [KEPT], [GB]
    monkeypatch.setattr(mx, "get_cache_memory", lambda: kept[0])
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(1))
    monkeypatch.setattr(device, "recommended_bytes", lambda: recommended[0])
    generate(tiny, "Once", max_tokens=2)
    assert cleared == []
    kept[0] += 1
    generate(tiny, "Once", max_tokens=2)
    assert len(cleared) == 2  # after the prompt, and at the end
    recommended[0] = 10 * kept[0]
    generate(tiny, "Once", max_tokens=2)
    assert len(cleared) == 2


def test_the_chunk_is_the_users_or_what_fits(
    tiny: Engine, limits: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = {"max_recommended_working_set_size": KEPT + tiny.nbytes + (8 << 20)}
    monkeypatch.setattr(mx, "device_info", lambda *device: facts)
    assert BatchEngine(tiny)._queue.chunk == 64
    assert BatchEngine(tiny, prefill_chunk=100)._queue.chunk == 100
    monkeypatch.setattr(device, "kind", lambda: "cpu")
    assert BatchEngine(tiny)._queue.chunk == 512


def test_rows_that_are_read_together_share_eight_chunks(
    tiny: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []
    run = Admission.run
    monkeypatch.setattr(Admission, "run", lambda *how: passes.append(run(*how)) or passes[-1])
    prompts = [[1, *range(5 + k, 36 + k)] for k in range(16)]
    batch_generate(tiny, prompts, max_tokens=1, prefill_chunk=16)
    assert passes == [128] * 4


def test_a_training_keeps_wired_what_it_was_predicted_to_take(
    tiny: Engine, limits: list[int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What MLX keeps goes back when it is more than that, and a tenth of what is recommended."""
    kept = iter([GB // 10, GB // 10 + 1, 0])
    cleared: list[int] = []
    monkeypatch.setattr(mx, "get_cache_memory", lambda: next(kept))
    monkeypatch.setattr(mx, "clear_cache", lambda: cleared.append(len(limits)))
    engine, pairs = small_engine(tiny), write_pairs(tmp_path / "pairs.jsonl")
    report = finetune(engine, pairs, tmp_path / "out", options(steps=3))
    total = report.predicted_bytes["total"]
    assert limits == [7, 0, total + KEPT, 7] and total < GB // 10
    assert cleared == [3]  # once, while it was held
