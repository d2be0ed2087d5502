"""One decoded token as a function to trace: this engine's step, and mlx-lm's on its own model,
cache and sampling.

No weights are made: every parameter is a broadcast scalar of the right shape and type, whose bits
are its number, so that a constant of the graph can be told from the next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any
from unittest.mock import patch

from openelm_mlx.benchmarks.hardware.roofline import settings
from openelm_mlx.benchmarks.ledger.fake_fast_ops import blank, fused, one_primitive_each
from openelm_mlx.benchmarks.ledger.graph import Graph, Node, fuse, trace
from openelm_mlx.device import mx, nn, utils
from openelm_mlx.engine.decode import State, Steps, StepSpec
from openelm_mlx.engine.options import SamplingOptions
from openelm_mlx.engine.sampling import Controls, Filters
from openelm_mlx.errors import BenchmarkError
from openelm_mlx.model.cache import BLOCK
from openelm_mlx.model.config import OpenELMConfig, layer_shapes
from openelm_mlx.model.decoder import OpenELM, Transposed

DTYPES = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}


@dataclass(frozen=True)
class Form:
    """How weights are stored and activations computed."""

    dtype: str = "bfloat16"
    quantization: Mapping[str, Any] | None = None  # config.json's, in mlx-lm's form

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise BenchmarkError(f"dtype is {self.dtype!r}; allowed: {', '.join(DTYPES)}")

    def __str__(self) -> str:
        form = self.quantization
        return self.dtype + (
            f", {form['bits']} bits in groups of {form['group_size']}" if form else ""
        )

    def apply(self, model: nn.Module) -> None:
        """Replace every parameter by a marked constant of this form; nothing is computed or
        allocated.
        """
        if self.quantization:
            try:
                nn.quantize(model, class_predicate=lambda path, module: self.settings(path, module))
            except (ValueError, TypeError) as error:
                raise BenchmarkError(
                    f"cannot quantize to {dict(self.quantization)}: {error}"
                ) from None
        marked = []
        parameters: list[tuple[str, mx.array]] = utils.tree_flatten(model.parameters())  # type: ignore[assignment]
        for number, (name, array) in enumerate(parameters):
            floating = mx.issubdtype(array.dtype, mx.floating)
            marked.append(
                (name, mark(number, array.shape, DTYPES[self.dtype] if floating else array.dtype))
            )
        model.update(utils.tree_unflatten(marked))  # type: ignore[arg-type]

    def settings(self, path: str, module: nn.Module) -> dict[str, Any] | bool:
        """How the layer at `path` is quantized, in the words of `nn.quantize`."""
        own = settings(path, self.quantization) if hasattr(module, "to_quantized") else None
        return (
            False
            if own is None
            else {key: own[key] for key in ("group_size", "bits", "mode") if key in own}
        )


def mark(number: int, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    bits = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[dtype.size]
    scalar = mx.array(number % 256**dtype.size, bits).view(dtype)
    array = mx.broadcast_to(scalar, shape)
    mx.eval(array)
    return array


def marked_as(array: mx.array, names: list[tuple[str, mx.array]]) -> str | None:
    """The parameter a constant is, None where it is none."""
    corner = array[(0,) * array.ndim] if array.ndim else array
    bits = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}.get(array.dtype.size)
    if bits is None or array.ndim == 0:
        return None
    number = int(corner.view(bits).item())  # type: ignore[arg-type]
    for name, parameter in names[number :: 256**array.dtype.size]:
        if parameter.dtype == array.dtype and array.shape in (
            parameter.shape,
            parameter.shape[::-1],
        ):  # as it is or transposed
            return name
    return None


@dataclass(frozen=True)
class Traced:
    """The graph of one token, with the names of the parameters among its constants and of the
    caches among its inputs.
    """

    engine: str
    graph: Graph
    parameters: dict[str, str]  # name in the graph -> parameter
    caches: frozenset[str]  # names in the graph of keys and values
    context: int  # tokens that the new one attends to, itself included
    capacity: int

    @cached_property
    def makers(self) -> dict[str, Node]:
        """The node that makes each array."""
        return {out.name: node for node in self.graph.nodes for out in node.outputs}


def our_model(config: OpenELMConfig, form: Form) -> OpenELM:
    model = OpenELM(config)
    form.apply(model)
    return ready(model)


def ready(model: OpenELM) -> OpenELM:
    """Make what the model derives from its weights once, so that no graph holds it."""
    for layer in model.layers:
        mx.eval(layer.attn.head_weights())
    mx.eval([module.transposed() for module in model.modules() if isinstance(module, Transposed)])
    return model


def our_step(model: OpenELM, compiled: bool) -> Callable[[State], State]:
    """The step of this engine, greedy: (state) -> the state one token further in every row."""
    step = Steps(model).step(StepSpec(Filters(), model.args.vocab_size, None, compiled))

    def run(state: State) -> State:
        (_, moved), buffers = step(state)
        return state.after(moved)._replace(buffers=buffers)

    return run


def our_state(config: OpenELMConfig, rows: int, context: int, dtype: mx.Dtype) -> State:
    """The state of as many greedy rows, each before the last of `context` tokens is fed."""
    capacity = -(-context // BLOCK) * BLOCK
    shapes = [
        (2, rows, shape.kv_heads, capacity, config.head_dim) for shape in layer_shapes(config)
    ]
    state = State(
        token=mx.ones(rows, mx.uint32),
        position=mx.full(rows, context - 1, mx.int32),
        alive=mx.ones(rows, mx.int32),
        key=mx.zeros((rows, 2), mx.uint32),
        controls=Controls.of([SamplingOptions()] * rows, Filters(), config.vocab_size),
        history=None,
        buffers=[[blank(shape, dtype)] for shape in shapes],
    )
    mx.eval(state)
    return state


def trace_ours(config: OpenELMConfig, form: Form, context: int = 64, rows: int = 1) -> Traced:
    """The compiled step of this engine, greedy, as each row attends to `context` tokens."""
    model = our_model(config, form)
    step, start = (
        our_step(model, compiled=False),
        our_state(config, rows, context, DTYPES[form.dtype]),
    )

    def flat(token: mx.array, position: mx.array, *kv: mx.array) -> list[mx.array]:
        after = step(
            start._replace(token=token, position=position, buffers=[[array] for array in kv])
        )
        return [
            after.token,
            after.position,
            *(array for arrays in after.buffers for array in arrays),
        ]

    kv = [array for arrays in start.buffers for array in arrays]
    with one_primitive_each(tagged=True):
        graph = trace(flat, start.token, start.position, *kv)
    return described("openelm-mlx", fuse(graph), model, 2, context, kv[0].shape[-2])


def mlx_lm_model(config: OpenELMConfig, form: Form) -> nn.Module:
    try:
        from mlx_lm.models import openelm
    except ImportError:
        raise BenchmarkError("mlx-lm is not installed; `pip install mlx-lm`") from None
    model = openelm.Model(openelm.ModelArgs.from_dict(config.to_hf_dict()))
    form.apply(model)
    return model


def mlx_lm_step(
    model: nn.Module, caches: list[Any]
) -> Callable[[mx.array], tuple[mx.array, mx.array]]:
    """What `generate_step` of mlx-lm does for a token, greedy: token [1] -> the next token and its log-probabilities."""

    def run(token: mx.array) -> tuple[mx.array, mx.array]:
        logits = model(token[None], cache=caches)[:, -1, :]
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        return mx.argmax(logprobs, axis=-1), logprobs.squeeze(0)

    return run


def mlx_lm_caches(config: OpenELMConfig, context: int, dtype: mx.Dtype) -> list[Any]:
    """mlx-lm's own `KVCache`s, filled up to the new token."""
    from mlx_lm.models.cache import KVCache

    caches = []
    for shape in layer_shapes(config):
        cache = KVCache()
        held = (1, shape.kv_heads, -(-context // cache.step) * cache.step, config.head_dim)
        cache.keys, cache.values, cache.offset = blank(held, dtype), blank(held, dtype), context - 1
        caches.append(cache)
    return caches


def trace_mlx_lm(config: OpenELMConfig, form: Form, context: int = 64) -> Traced:
    """mlx-lm's model as its `generate_step` runs it: uncompiled, but for the activation it compiles
    by itself.
    """
    from mlx_lm.models import openelm

    model = mlx_lm_model(config, form)
    caches = mlx_lm_caches(config, context, DTYPES[form.dtype])
    buffers = [array for cache in caches for array in (cache.keys, cache.values)]
    step = mlx_lm_step(model, caches)

    def flat(token: mx.array, *kv: mx.array) -> list[mx.array]:
        for cache, keys, values in zip(caches, kv[::2], kv[1::2], strict=True):
            cache.keys, cache.values, cache.offset = keys, values, context - 1
        token, logprobs = step(token)
        return [
            token,
            logprobs,
            *(array for cache in caches for array in (cache.keys, cache.values)),
        ]

    with ExitStack() as stack:
        stack.enter_context(one_primitive_each(tagged=True))
        stack.enter_context(patch.object(openelm, "swiglu", lambda gate, x: fused(x, gate, x)))
        graph = trace(flat, mx.array([1], mx.uint32), *buffers)
    return described("mlx-lm", graph, model, 1, context, buffers[0].shape[2])


def described(
    engine: str, graph: Graph, model: nn.Module, first: int, context: int, capacity: int
) -> Traced:
    names: list[tuple[str, mx.array]] = utils.tree_flatten(model.parameters())  # type: ignore[assignment]
    found = {name: marked_as(array, names) for name, array in graph.constants.items()}
    caches = frozenset(array.name for array in graph.inputs[first:])
    return Traced(engine, graph, {k: v for k, v in found.items() if v}, caches, context, capacity)


def shrunk(config: OpenELMConfig) -> OpenELMConfig:
    """As many layers, each of the least width: what the host does for a token stays, what the
    device computes goes.
    """
    n = config.num_transformer_layers
    return replace(
        config,
        model_dim=64,
        head_dim=64,
        vocab_size=64,
        ffn_dims=(64,) * n,
        num_query_heads=(1,) * n,
        num_kv_heads=(1,) * n,
        num_gqa_groups=1,
        ffn_dim_divisor=64,
        qkv_multipliers=(1.0,),
        ffn_multipliers=(1.0,),
    )
