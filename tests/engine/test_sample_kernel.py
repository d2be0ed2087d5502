"""One kernel filters and draws: its tokens are those of the operations of MLX."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from metal_emulator import ORDERS, Emulator
from sampling_rows import softmax

from openelm_mlx import EngineOptions, SamplingOptions, generate, load
from openelm_mlx.device import mx
from openelm_mlx.engine.sampling import Context, Controls, Filters, draw, filter_logits, seed_key
from openelm_mlx.model.kernels import sample
from openelm_mlx.model.kernels.kernel import running

ONLY = frozenset({"sample"})
DTYPES = [mx.float32, mx.float16, mx.bfloat16]
NOTHING = mx.zeros(1, mx.uint32)


def given(
    logits: np.ndarray, options: list[SamplingOptions], dtype: mx.Dtype, positions: Any
) -> tuple[mx.array, Filters, Context]:
    """What `draw` takes for rows of these options."""
    filters = Filters.of(options)
    controls = Controls.of(options, filters, logits.shape[1])
    keys = mx.concatenate([seed_key(one.seed or 0) for one in options])
    context = Context(controls, keys, mx.array(positions, mx.int32), NOTHING)
    return mx.array(logits.astype(np.float32)).astype(dtype), filters, context


def by_kernel(orders: Any = (0,), **inputs: Any) -> list[int]:
    emulator = Emulator(orders)
    with running(emulator, ONLY):
        tokens = draw(*given(**inputs))
    assert emulator.launches == 1 and tokens.dtype == mx.uint32
    return tokens.tolist()


def assert_as_twin(orders: Any = (0,), **inputs: Any) -> None:
    assert by_kernel(orders, **inputs) == draw(*given(**inputs)).tolist()


def random_logits(rng: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    """Rows of which some are flat or steep, have many equal logits, or forbid most tokens."""
    logits = rng.normal(size=(rows, vocab)) * rng.choice([0.1, 2, 5, 20], size=(rows, 1))
    logits[rng.random(rows) < 0.3] = 1.5
    rounded = rng.random(rows) < 0.3
    logits[rounded] = np.round(logits[rounded])  # zeros of both signs among them
    forbidden = rng.random((rows, vocab)) < rng.choice([0, 0, 0.3, 0.99], size=(rows, 1))
    forbidden[np.arange(rows), rng.integers(0, vocab, rows)] = False
    return np.where(forbidden, -np.inf, logits)


def random_options(rng: np.random.Generator, vocab: int, on: Any) -> SamplingOptions:
    """Settings of one row; `on` says which filters it may have: top-k, top-p, min-p."""
    few = [1, 2, 5, 40, max(vocab - 1, 1), vocab, vocab + 5, int(rng.integers(1, vocab + 1))]
    return SamplingOptions(
        temperature=float(rng.choice([0, 1e-9, 0.3, 0.7, 1, 1.5, 20, 100])),
        top_k=int(rng.choice([0, *few])) if on[0] else 0,
        top_p=float(rng.choice([0, 1e-6, 0.1, 0.5, 0.9, 0.9999, 1, rng.random()])) if on[1] else 1,
        min_p=float(rng.choice([0, 1e-4, 0.05, 0.3, 1])) if on[2] else 0,
        seed=int(rng.integers(2**40)),
    )


@pytest.mark.needs("emulated kernels")
@pytest.mark.parametrize(
    ("vocab", "launches", "listed"),
    [(7, 12, 512), (64, 24, 512), (64, 72, 8), (1000, 8, 512), (1000, 16, 16), (4096, 3, 512)],
)
def test_tokens_are_those_of_the_operations(vocab, launches, listed, monkeypatch):
    """Every combination of filters in every type; short lists leave more to be narrowed down."""
    monkeypatch.setattr(sample, "LIST", listed)
    rng = np.random.default_rng(vocab + listed)
    for number in range(launches):
        on = [number >> bit & 1 for bit in range(3)]
        options = [random_options(rng, vocab, on) for _ in range(16)]
        options.append(SamplingOptions(temperature=1.0))  # at least one row is not greedy
        assert_as_twin(
            ORDERS if number == 7 and vocab < 1000 else (0,),
            logits=random_logits(rng, len(options), vocab),
            options=options,
            dtype=DTYPES[number % 3],
            positions=rng.integers(0, 2048, len(options)),
        )


@pytest.mark.needs("emulated kernels")
def test_the_order_of_threads_is_of_no_consequence():
    rng = np.random.default_rng(1)
    options = [
        SamplingOptions(temperature=0.7, top_k=700, top_p=0.97, min_p=0.001),
        SamplingOptions(temperature=50.0, top_p=0.9),
        SamplingOptions(temperature=1.0),
    ]
    assert_as_twin(
        ORDERS,
        logits=np.round(rng.normal(size=(3, 2000)) * 8),
        options=options,
        dtype=mx.bfloat16,
        positions=[1, 2, 3],
    )


def kept(logits: np.ndarray, o: SamplingOptions) -> list[int]:
    """The tokens that stay, likeliest first, by plain arithmetic in float64."""
    ranking = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    stay = ranking[: o.top_k or len(logits)]
    p = softmax(logits[stay] / o.temperature)
    stay = stay[: 1 + int((np.cumsum(p) < o.top_p).sum())]
    return [token for token, share in zip(stay, p, strict=False) if share >= o.min_p * p[0]]


@pytest.mark.needs("emulated kernels")
@pytest.mark.parametrize("listed", [512, 8])
@pytest.mark.parametrize("seed", range(4))
def test_the_tokens_that_stay_are_those_of_float64(seed, listed, monkeypatch):
    """Each of few tokens is drawn by 500 draws, at a temperature so high that
    none is rare. Where the mass reaches top-p within rounding one token may differ.
    """
    monkeypatch.setattr(sample, "LIST", listed)
    rng = np.random.default_rng(seed)
    logits = np.float32(np.round(rng.normal(size=40) * 2, seed % 3))
    options = SamplingOptions(
        temperature=8.0,
        top_k=int(rng.integers(10, 45)),
        top_p=float(rng.uniform(0.3, 1)),
        min_p=float(rng.choice([0, 0.5])),
        seed=seed,
    )
    tokens = by_kernel(
        logits=np.tile(logits, (500, 1)),
        options=[options] * 500,
        dtype=mx.float32,
        positions=np.arange(500),
    )
    wanted = kept(logits.astype(np.float64), options)
    assert set(tokens) in ({*wanted}, {*wanted[:-1]}, {*kept(logits, options)})


@pytest.mark.needs("emulated kernels")
def test_tokens_are_as_frequent_as_likely():
    """Chi-square with 4 to 19 degrees of freedom; the seed is fixed."""
    logits = np.float32([2.0, 1.0, 0.5, 0.0, -1.0, -3.0] + [0.7] * 14)
    for options in (
        SamplingOptions(temperature=1.0, seed=3),
        SamplingOptions(temperature=1.5, top_k=12, top_p=0.9, seed=4),
        SamplingOptions(temperature=0.5, min_p=0.1, seed=5),
    ):
        count = 2000
        inputs = {
            "logits": np.tile(logits, (count, 1)),
            "options": [options] * count,
            "dtype": mx.float32,
            "positions": np.arange(count),
        }
        seen = np.bincount(by_kernel(**inputs), minlength=logits.size)
        few = given(logits[None], [options], mx.float32, [0])
        p = np.array(mx.softmax(filter_logits(*few), axis=-1))[0]
        assert seen[p == 0].sum() == 0
        expected = count * p[p > 0]
        degrees = expected.size - 1
        chi_square = ((seen[p > 0] - expected) ** 2 / expected).sum()
        assert abs(chi_square - degrees) < 3 * np.sqrt(2 * degrees)


@pytest.mark.needs("emulated kernels")
def test_a_mass_that_no_token_reaches_and_logits_that_are_no_numbers_end():
    """Whatever a model computes, a token of the vocabulary comes out."""
    options = [SamplingOptions(temperature=1.0, top_k=9, top_p=0.5)] * 3
    logits = np.zeros((3, 1000))
    logits[0], logits[1], logits[2, 5:] = -np.inf, np.nan, np.inf
    tokens = by_kernel(logits=logits, options=options, dtype=mx.float32, positions=[0, 1, 2])
    assert all(0 <= token < 1000 for token in tokens)


@pytest.mark.needs("emulated kernels")
def test_the_kernel_draws_unless_tokens_are_excluded_or_none_is_sampled():
    engine, how = load("openelm-tiny"), EngineOptions(compiled=False)

    def launches(**settings: Any) -> bool:
        emulator = Emulator()
        with running(emulator, ONLY):
            generate(engine, "The", max_tokens=2, engine_options=how, **settings)
        return emulator.launches > 0

    assert launches(temperature=1.0)
    assert launches(temperature=1.0, top_k=5, top_p=0.5, min_p=0.1, repetition_penalty=2.0)
    assert not launches()
    assert not launches(temperature=1.0, top_k=1)
    assert not launches(temperature=1.0, xtc_probability=0.5, xtc_threshold=0.1)


@pytest.mark.needs("emulated kernels")
def test_an_answer_is_the_same_with_the_kernel():
    """Penalties come before it, and drafts are verified by several rows of it."""
    engine = load("openelm-tiny")
    answers: list[list[str]] = []
    for names in (frozenset(), ONLY):
        emulator = Emulator()
        with running(emulator, names):
            answers.append([])
            for settings in (
                {"top_k": 40, "top_p": 0.95},
                {"min_p": 0.05, "repetition_penalty": 1.3},
                {"top_p": 0.9, "prompt_lookup": 2, "adaptive_draft": False},
            ):
                text = generate(
                    engine,
                    "The cat sat on the mat. The cat",
                    max_tokens=6,
                    temperature=0.9,
                    seed=5,
                    engine_options=EngineOptions(compiled=False),
                    **settings,
                )
                answers[-1].append(text)
        assert (emulator.launches >= 8) == bool(names)
    assert answers[0] == answers[1] and len({*answers[0]}) == 3
