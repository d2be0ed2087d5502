"""The step that decodes one token, in this engine and in mlx-lm, to be traced or timed."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from openelm_mlx.benchmarks.ledger.graph import (
    Traced,
    fused,
    mark,
    named,
    one_primitive_each,
    trace,
)
from openelm_mlx.device import mx, nn, utils
from openelm_mlx.dtypes import DTYPES, FLOATS
from openelm_mlx.engine.decode import State, Steps, StepSpec
from openelm_mlx.engine.options import SamplingOptions
from openelm_mlx.engine.sampling import Controls, Filters
from openelm_mlx.errors import BenchmarkError
from openelm_mlx.graph.trace import blank, fuse
from openelm_mlx.model.cache import BLOCK
from openelm_mlx.model.config import OpenELMConfig, layer_shapes
from openelm_mlx.model.decoder import OpenELM
from openelm_mlx.model.projections import Transposed
from openelm_mlx.quantization import spec_of

TURN, WARM_UP = 12, 4  # steps of each engine in a turn, and those of them that are not counted
GREEDY = SamplingOptions()
FIRST, LAST = 8, 200  # positions of timed steps, all within the first block of the buffers


@dataclass(frozen=True)
class WeightSpec:
    """The types in which weights are stored and activations computed.

    `quantization` is config.json's, in mlx-lm's format. Raises `BenchmarkError`.
    """

    dtype: str = "bfloat16"
    quantization: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.dtype not in FLOATS:
            raise BenchmarkError(f"dtype is {self.dtype!r}; allowed: {', '.join(FLOATS)}")

    def __str__(self) -> str:
        if not self.quantization:
            return self.dtype
        bits, group_size = (self.quantization[key] for key in ("bits", "group_size"))
        return f"{self.dtype}, {bits} bits in groups of {group_size}"

    @property
    def mlx(self) -> mx.Dtype:
        return DTYPES[self.dtype].mlx

    def apply(self, model: nn.Module) -> None:
        """Replace every parameter by a marked constant; nothing is computed or allocated."""
        if self.quantization:
            try:
                nn.quantize(model, class_predicate=self.layer)
            except (ValueError, TypeError) as error:
                text = f"cannot quantize to {dict(self.quantization)}: {error}"
                raise BenchmarkError(text) from None
        marked = []
        for number, (name, array) in enumerate(named(model)):
            dtype = self.mlx if mx.issubdtype(array.dtype, mx.floating) else array.dtype
            marked.append((name, mark(number, array.shape, dtype)))
        model.update(utils.tree_unflatten(marked))  # type: ignore[arg-type]

    def layer(self, path: str, module: nn.Module) -> dict[str, Any] | bool:
        """Return how the layer at `path` is quantized, as `nn.quantize` asks it."""
        if self.quantization is None or not hasattr(module, "to_quantized"):
            return False
        spec = spec_of(self.quantization, path)
        return False if spec is None else spec.as_config()


def our_model(config: OpenELMConfig, spec: WeightSpec) -> OpenELM:
    model = OpenELM(config)
    spec.apply(model)
    return ready(model)


def ready(model: OpenELM) -> OpenELM:
    """Make what the model derives from its weights once, so that no graph contains it."""
    for layer in model.layers:
        mx.eval(layer.attn.head_weights(layer.attn.norm_weights()))
    mx.eval([module.transposed() for module in model.modules() if isinstance(module, Transposed)])
    return model


def our_step(
    model: OpenELM, compiled: bool, sampling: SamplingOptions = GREEDY
) -> Callable[[State], State]:
    """Return this engine's step, from one state to the next in every row."""
    filters = Filters.of([sampling])
    step = Steps(model).step(StepSpec(filters, model.args.vocab_size, None, compiled))

    def run(state: State) -> State:
        (_, moved), buffers = step(state)
        return state.after(moved)._replace(buffers=buffers)

    return run


def our_state(
    config: OpenELMConfig,
    rows: int,
    context: int,
    dtype: mx.Dtype,
    sampling: SamplingOptions = GREEDY,
) -> State:
    """Return the state of as many rows, each before the last of `context` tokens is fed."""
    capacity = -(-context // BLOCK) * BLOCK
    shapes = [(2, rows, s.kv_heads, capacity, config.head_dim) for s in layer_shapes(config)]
    state = State(
        token=mx.ones(rows, mx.uint32),
        position=mx.full(rows, context - 1, mx.int32),
        alive=mx.ones(rows, mx.int32),
        key=mx.zeros((rows, 2), mx.uint32),
        controls=Controls.of([sampling] * rows, Filters.of([sampling]), config.vocab_size),
        history=None,
        buffers=[[blank(shape, dtype)] for shape in shapes],
    )
    mx.eval(state)
    return state


def trace_ours(
    config: OpenELMConfig,
    spec: WeightSpec,
    context: int = 64,
    rows: int = 1,
    sampling: SamplingOptions = GREEDY,
    kernels: bool = True,
) -> Traced:
    """Trace the compiled step of this engine, as each row attends to `context` tokens.

    Without `kernels` it is made of MLX's operations only, as on a processor.
    """
    model = our_model(config, spec)
    start = our_state(config, rows, context, spec.mlx, sampling)
    step = our_step(model, compiled=False, sampling=sampling)  # what is traced is fused below

    def flat(token: mx.array, position: mx.array, *kv: mx.array) -> list[mx.array]:
        buffers = [[array] for array in kv]
        after = step(start._replace(token=token, position=position, buffers=buffers))
        return [after.token, after.position, *(a for arrays in after.buffers for a in arrays)]

    with one_primitive_each(tagged=True, kernels=kernels):
        graph = trace(flat, start.token, start.position, *(kv for (kv,) in start.buffers))
    engine = "openelm-mlx" if kernels else "no kernels"
    return Traced.of(engine, fuse(graph), model, 2, context)


def mlx_lm_model(config: OpenELMConfig, spec: WeightSpec) -> nn.Module:
    try:
        from mlx_lm.models import openelm
    except ImportError:
        raise BenchmarkError("mlx-lm is not installed; `pip install mlx-lm`") from None
    model = openelm.Model(openelm.ModelArgs.from_dict(config.to_hf_dict()))
    spec.apply(model)
    return model


def mlx_lm_step(model: nn.Module, caches: list[Any]) -> Callable[[mx.array], list[mx.array]]:
    """Return what mlx-lm's `generate_step` does for a token, greedy.

    It takes a token [1] to the next one and its log-probabilities.
    """

    def run(token: mx.array) -> list[mx.array]:
        logits = model(token[None], cache=caches)[:, -1, :]
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        return [mx.argmax(logprobs, axis=-1), logprobs.squeeze(0)]

    return run


def mlx_lm_caches(config: OpenELMConfig, context: int, dtype: mx.Dtype) -> list[Any]:
    """Return mlx-lm's own `KVCache`s, filled up to the new token."""
    from mlx_lm.models.cache import KVCache

    caches = []
    for shape in layer_shapes(config):
        cache = KVCache()
        full = (1, shape.kv_heads, -(-context // cache.step) * cache.step, config.head_dim)
        cache.keys, cache.values, cache.offset = blank(full, dtype), blank(full, dtype), context - 1
        caches.append(cache)
    return caches


def trace_mlx_lm(config: OpenELMConfig, spec: WeightSpec, context: int = 64) -> Traced:
    """Trace mlx-lm's model as its `generate_step` runs it.

    It is not compiled, except for the activation that it compiles by itself.
    """
    from mlx_lm.models import openelm

    model, caches = mlx_lm_model(config, spec), mlx_lm_caches(config, context, spec.mlx)
    step = mlx_lm_step(model, caches)

    def flat(token: mx.array, *kv: mx.array) -> list[mx.array]:
        for cache, keys, values in zip(caches, kv[::2], kv[1::2], strict=True):
            cache.keys, cache.values, cache.offset = keys, values, context - 1
        return [*step(token), *(a for cache in caches for a in (cache.keys, cache.values))]

    gate = patch.object(openelm, "swiglu", lambda gate, x: fused(x, gate, x))
    with one_primitive_each(tagged=True), gate:
        buffers = [array for cache in caches for array in (cache.keys, cache.values)]
        graph = trace(flat, mx.array([1], mx.uint32), *buffers)
    return Traced.of("mlx-lm", graph, model, 1, context)


@dataclass(frozen=True)
class HostTime:
    """Median CPU seconds of the thread that generates: waiting is not its work."""

    build: float  # until the graph of a step exists
    submit: float  # until MLX has handed it to the device

    @property
    def total(self) -> float:
        return self.build + self.submit


def host_times(config: OpenELMConfig, spec: WeightSpec, steps: int) -> dict[str, HostTime]:
    """Time this engine's step, compiled and eager, and mlx-lm's, in turns of steps of their own.

    The models have as many layers as `config`, each of the least width, in float32, which the CPU
    backend need not emulate. Every `mx.fast` call is one primitive that computes nothing, as on a
    GPU it is one kernel; kernels of our own are not in use. Work is awaited outside the clock.
    """
    small, spec = shrunk(config), WeightSpec("float32", spec.quantization)
    with one_primitive_each(kernels=False), undisturbed():
        engines = {
            "openelm-mlx, compiled": our_steps(small, spec, compiled=True),
            "openelm-mlx, eager": our_steps(small, spec, compiled=False),
            "mlx-lm": mlx_lm_steps(small, spec),
        }
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
        for _ in range(-(-steps // (TURN - WARM_UP))):
            for name, engine in engines.items():
                turn = [timed(engine) for _ in range(TURN)]
                # the first find the processor's caches filled by the other engine
                seconds[name] += turn[WARM_UP:]
    medians = {name: map(median, zip(*pairs, strict=True)) for name, pairs in seconds.items()}
    return {name: HostTime(*pair) for name, pair in medians.items()}


def timed(engine: Iterator[list[mx.array]]) -> tuple[float, float]:
    """Return the CPU seconds that the next step takes to be built and to be submitted."""
    start = time.thread_time()
    outputs = next(engine)
    built = time.thread_time()
    mx.async_eval(outputs)
    stop = time.thread_time()
    mx.synchronize()
    return built - start, stop - built


def our_steps(config: OpenELMConfig, spec: WeightSpec, compiled: bool) -> Iterator[list[mx.array]]:
    """Yield what each step of this engine submits."""
    model = our_model(config, spec)
    fill(model)
    step, state = our_step(ready(model), compiled), our_state(config, 1, FIRST + 1, spec.mlx)
    buffers = [[mx.zeros(a.shape, a.dtype) for a in arrays] for arrays in state.buffers]
    start = state.position
    state = state._replace(buffers=buffers)
    mx.eval(state)
    while True:
        for _ in range(FIRST, LAST):
            state = step(state)
            yield [state.token]
        state = state._replace(position=start)


def mlx_lm_steps(config: OpenELMConfig, spec: WeightSpec) -> Iterator[list[mx.array]]:
    """Yield what each step of mlx-lm submits."""
    model, caches = mlx_lm_model(config, spec), mlx_lm_caches(config, FIRST + 1, spec.mlx)
    fill(model)
    for cache in caches:
        cache.keys, cache.values = (mx.zeros(a.shape, a.dtype) for a in (cache.keys, cache.values))
        mx.eval(cache.keys, cache.values)
    step, token = mlx_lm_step(model, caches), mx.array([1], mx.uint32)
    while True:
        for cache in caches:
            cache.offset = min(cache.offset, LAST)
        token, logprobs = step(token)
        yield [token, logprobs]


def fill(model: nn.Module) -> None:
    """Give the model weights that lie in memory as real ones do; a broadcast would be copied."""
    zeros = utils.tree_map(lambda array: mx.zeros(array.shape, array.dtype), model.parameters())
    model.update(zeros)
    mx.eval(model.parameters())


def shrunk(config: OpenELMConfig) -> OpenELMConfig:
    """Return a model of as many layers, each as narrow as can be, so that only the host works."""
    return OpenELMConfig(
        num_transformer_layers=config.num_transformer_layers,
        model_dim=64,
        head_dim=64,
        vocab_size=64,
        num_gqa_groups=1,
        ffn_dim_divisor=64,
        qkv_multipliers=(1.0,),
        ffn_multipliers=(1.0,),
        share_input_output_layers=config.share_input_output_layers,
    )


@contextmanager
def undisturbed() -> Iterator[None]:
    """Keep MLX's threads off the clock: one core for all of this process, without preemption.

    On the CPU backend the device is a thread of this process. On a core of its own it fights with
    the host for locks, of the allocator first, which no GPU does. Linux only; elsewhere, and if
    it is forbidden, nothing changes.
    """
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    mx.eval(mx.zeros(1) + 1)  # MLX's thread exists from now on
    threads = [int(task.name) for task in Path("/proc/self/task").iterdir()]
    cores = os.sched_getaffinity(0)

    def arrange(cores: set[int], policy: int) -> None:
        for thread in threads:
            with suppress(OSError):  # the thread has ended meanwhile, or this is forbidden
                os.sched_setaffinity(thread, cores)
                os.sched_setscheduler(thread, policy, os.sched_param(0))

    try:
        arrange({max(cores)}, os.SCHED_BATCH)
        yield
    finally:
        arrange(cores, os.SCHED_OTHER)
