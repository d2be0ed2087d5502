"""A sum and its norm: the kernel has the values of the operations, and a model its logits."""

from __future__ import annotations

import pytest
from metal_emulator import ORDERS, Emulator
from small import random_adapter, random_model

from openelm_mlx.device import mx, nn, utils
from openelm_mlx.model.adapters import adapted
from openelm_mlx.model.cache import KVCache
from openelm_mlx.model.config import PUBLISHED, OpenELMConfig
from openelm_mlx.model.decoder import DecoderLayer, OpenELM
from openelm_mlx.model.kernels.add_rms_norm import Sum, fits, sum_and_norm
from openelm_mlx.model.kernels.kernel import running

WIDTHS = [OpenELMConfig.from_name(name).model_dim for name in PUBLISHED if "-" not in name]
ONLY = frozenset({"add_rms_norm"})
TOKENS = mx.array([[1, 5, 9, 30, 12, 7, 7, 3], [1, 9, 30, 2, 9, 3, 3, 60]])


def normal(seed: int, *shape: int, dtype: mx.Dtype = mx.float32) -> mx.array:
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def norm(width: int, dtype: mx.Dtype) -> nn.RMSNorm:
    layer = nn.RMSNorm(width, eps=1e-6)
    layer.weight = normal(3, width, dtype=dtype)
    return layer


@pytest.mark.needs("emulated kernels")
@pytest.mark.parametrize(
    ("dtype", "width", "rows", "most"),
    [(mx.bfloat16, width, 2, 0) for width in WIDTHS]
    + [(mx.bfloat16, 70, 5, 0), (mx.float16, 70, 3, 1e-3), (mx.float16, 1280, 1, 1e-3)]
    + [(mx.float32, 1, 1, 1e-6), (mx.float32, 131, 5, 1e-6), (mx.float32, 4096, 1, 4e-6)],
    ids=str,
)
def test_the_kernel_is_the_operations(dtype, width, rows, most):
    """The sum is equal; of the norm float32 is off by the order of additions, and float16 by a
    unit in few places.
    """
    x = Sum(normal(1, rows, width, dtype=dtype), 0.25 * normal(2, rows, width, dtype=dtype))
    layer = norm(width, dtype)
    wanted, emulator = sum_and_norm(x, layer), Emulator(ORDERS)
    with running(emulator, ONLY):
        total, normed = sum_and_norm(x, layer)
    assert emulator.launches == 1 and normed.dtype == dtype
    assert mx.array_equal(total, wanted[0])
    scale = mx.maximum(mx.abs(wanted[1]), 1).astype(mx.float32)
    difference = mx.abs(normed.astype(mx.float32) - wanted[1].astype(mx.float32))
    assert (difference / scale).max().item() <= most
    assert dtype == mx.float32 or (normed != wanted[1]).mean().item() < 0.01


def test_other_types_and_wide_rows_take_the_operations():
    x, weight = normal(1, 2, 64), mx.ones(64)
    assert fits(x, x, weight)
    assert not fits(x, x.astype(mx.bfloat16), weight)
    assert not fits(x, x, weight.astype(mx.float16))
    assert not fits(x.astype(mx.int32), x.astype(mx.int32), weight.astype(mx.int32))
    assert not fits(x, x[:1], weight)
    assert fits(*[mx.zeros((1, 4096))] * 2, mx.ones(4096))
    assert not fits(*[mx.zeros((1, 4100))] * 2, mx.ones(4100))
    assert not fits(*[mx.zeros((65536, 1))] * 2, mx.ones(1))
    with running(Emulator(), ONLY):
        total, normed = sum_and_norm(Sum(x, x.astype(mx.bfloat16)), norm(64, mx.float32))
    assert total.dtype == normed.dtype == mx.float32


def packed(dtype: mx.Dtype = mx.float32) -> OpenELM:
    model = random_model(seed=1)
    model.set_dtype(dtype)
    nn.quantize(model, 32, 4)
    return model


def passes(model: OpenELM, last: bool | mx.array) -> mx.array:
    """Logits of a prompt in two chunks and of a token after it, of two rows."""
    cache = KVCache(model.args)
    model.hidden(TOKENS[:, :3], cache)
    prompt = model.hidden(TOKENS[:, 3:7], cache, last=last)
    after = model.hidden(TOKENS[:, 7], cache, last=True)
    return model.logits(mx.concatenate([prompt.reshape(-1, 64), after]))


@pytest.mark.needs("emulated kernels")
@pytest.mark.parametrize("last", [False, True, mx.array([1, 3])], ids=["all", "last", "places"])
def test_a_quantized_model_adds_twice_a_layer_in_its_norms(last):
    model, emulator = packed(), Emulator()
    wanted = passes(model, last)
    with running(emulator, ONLY):
        logits = passes(model, last)
    assert mx.abs(logits - wanted).max().item() < 1e-4
    # the gathered rows of the last layer's first sum are added before the norm of its network
    assert emulator.launches == 3 * 2 * len(model.layers)


@pytest.mark.needs("emulated kernels")
def test_bfloat16_is_equal_bit_for_bit():
    model = packed(mx.bfloat16)
    wanted = passes(model, last=False)
    with running(Emulator(), ONLY):
        assert mx.array_equal(passes(model, last=False), wanted)


@pytest.mark.needs("emulated kernels")
@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_what_an_adapter_changes_of_a_quantized_model_is_added_likewise(dora):
    model = packed()
    model = adapted(model, random_adapter(model, 1, dora=dora, only="layers"))
    wanted, emulator = passes(model, last=True), Emulator()
    with running(emulator, ONLY):
        logits = passes(model, last=True)
    assert mx.abs(logits - wanted).max().item() < 1e-3
    assert emulator.launches == 3 * 2 * len(model.layers)


def gradients(model: OpenELM) -> list[mx.array]:
    """Those of the norms; packed weights have none."""
    model.freeze()
    model.apply_to_modules(lambda _, m: m.unfreeze() if isinstance(m, nn.RMSNorm) else None)
    _, tree = nn.value_and_grad(model, lambda m, t: m(t).sum())(model, TOKENS)
    return [array for _, array in utils.tree_flatten(tree)]


def checkpointed(layer: DecoderLayer, *inputs: object) -> object:
    """Call a layer as the trainer of mlx-lm does that saves memory (tuner/trainer.py)."""

    def inner(weights: dict, *inputs: object) -> object:
        layer.update(weights)
        return call(layer, *inputs)

    return mx.checkpoint(inner)(layer.trainable_parameters(), *inputs)


call = DecoderLayer.__call__


def test_who_adds_on_its_own_and_who_is_trained_needs_no_kernel(monkeypatch):
    """A plain matrix adds in its product, and its adapter too; a kernel has no gradient."""
    emulator, plain = Emulator(), random_model(seed=1)
    with running(emulator, ONLY):
        passes(plain, last=True)
        passes(adapted(plain, random_adapter(plain, 1, only="layers")), last=True)
        found = gradients(packed())
    assert emulator.launches == 0
    monkeypatch.setattr(DecoderLayer, "__call__", checkpointed)
    saved = gradients(packed())
    assert len(found) == 9 and all(map(mx.array_equal, found, saved))
    assert all(mx.abs(gradient).max().item() > 0 for gradient in found)
