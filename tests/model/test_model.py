"""The decoder: its heads computed plainly, modules in place of its projections, gradients, and
mlx-lm's caches.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from small import random_model

from openelm_mlx.device import mx, nn, utils
from openelm_mlx.model.cache import KVCache, step_caches
from openelm_mlx.model.cache_kinds import CacheKind
from openelm_mlx.model.config import layer_shapes
from openelm_mlx.model.decoder import Attention
from openelm_mlx.model.heads import Projection, rotary
from openelm_mlx.model.projections import MANY, Embedding, Linear

TOKENS = mx.array([[1, 5, 9, 30, 12, 7, 7, 3], [1, 9, 30, 2, 9, 3, 3, 60]])
PROJECTIONS = [("attn", "qkv_proj"), ("attn", "out_proj"), ("ffn", "proj_1"), ("ffn", "proj_2")]


class Adapted(nn.Module):
    """A projection with a low-rank addition of its own (LoRA, arXiv:2106.09685)."""

    def __init__(self, inner: nn.Linear, seed: int) -> None:
        super().__init__()
        outputs, inputs = inner.weight.shape
        self.inner = inner
        self.a = mx.random.normal((inputs, 3), key=mx.random.key(seed)) * 0.2
        self.b = mx.random.normal((3, outputs), key=mx.random.key(seed + 1)) * 0.2

    def __call__(self, x: mx.array) -> mx.array:
        return self.inner(x) + x @ self.a @ self.b


class AdaptedLinear(Linear):
    """The same as a child of the projection's own class."""

    def __init__(self, inner: nn.Linear, seed: int) -> None:
        super().__init__(*inner.weight.shape[::-1])
        self.weight = inner.weight
        adapted = Adapted(inner, seed)
        self.a, self.b = adapted.a, adapted.b

    def __call__(self, x: mx.array) -> mx.array:
        return super().__call__(x) + x @ self.a @ self.b


def places(model):
    return [(getattr(layer, part), name) for layer in model.layers for part, name in PROJECTIONS]


def adapted(kind):
    """The same model twice: with the additions beside its weights, and within them."""
    beside, within = random_model(seed=1), random_model(seed=1)
    for seed, ((part, name), (other, _)) in enumerate(
        zip(places(beside), places(within), strict=True)
    ):
        module = kind(getattr(part, name), 10 * seed)
        setattr(part, name, module)
        getattr(other, name).weight = getattr(other, name).weight + (module.a @ module.b).T
    return beside, within


@pytest.mark.parametrize("kind", [Adapted, AdaptedLinear])
def test_what_stands_in_place_of_a_projection_is_called(kind):
    beside, within = adapted(kind)
    wanted = within(TOKENS)
    assert mx.abs(random_model(seed=1)(TOKENS) - wanted).max().item() > 0.1
    cache = KVCache(beside.args)
    beside(TOKENS[:, :5], cache)

    def step(token, position, buffers):
        return beside.logits(
            beside.hidden(token, step_caches(buffers, position, CacheKind()), last=True)
        )

    stepped = mx.compile(step)(TOKENS[:, 5], mx.array([5, 5]), cache.arrays)
    alone = KVCache(beside.args)
    beside(TOKENS[:1, :7], alone)
    for found, expected in (
        (beside(TOKENS), wanted),
        (beside(TOKENS[:, 5:], cache), wanted[:, 5:]),
        (stepped, wanted[:, 5]),
        (beside(TOKENS[:1, 7:], alone), wanted[:1, 7:]),
    ):
        assert mx.abs(found - expected).max().item() < 1e-4


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 5), (3, 1), (2, 4)])
@pytest.mark.parametrize("normalize", [True, False])
def test_heads_are_those_of_the_plain_norm_and_rotation(batch, length, normalize):
    config = replace(random_model(seed=1).args, normalize_qk_projections=normalize)
    attention = Attention(config, layer_shapes(config)[0])
    if normalize:
        for number, norm in enumerate((attention.q_norm, attention.k_norm)):
            norm.weight = mx.random.normal(norm.weight.shape, key=mx.random.key(number))
    heads, base, offset = attention.q_heads + 2 * attention.kv_heads, config.rope_freq_constant, 3
    raw = mx.random.normal((batch, length, heads, attention.head_dim), key=mx.random.key(5))
    rotation = rotary(mx.arange(offset, offset + length)[None], attention.head_dim, base)
    eps = attention.eps if normalize else None
    weights = attention.head_weights(attention.norm_weights())
    plain = attention.plain_heads(raw, offset, base)
    for last in (False, True):
        found = Projection(raw, weights, rotation, attention.q_heads, eps, None, last).heads()
        expected = (plain[0][:, :, -1:], plain[1]) if last else plain
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.shape == theirs.shape and mx.allclose(ours, theirs, atol=1e-5).item()


def loss(model, tokens):
    return nn.losses.cross_entropy(model(tokens[:, :-1]), tokens[:, 1:], reduction="mean")


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS[:1]], ids=["batch", "one"])
def test_gradients_of_an_adapter_are_those_of_the_weights_it_adds_to(tokens):
    """W + (a b)^T: the gradient of a is (b dW)^T, that of b is (dW a)^T."""
    beside, within = adapted(Adapted)
    beside.freeze()
    for part, name in places(beside):
        getattr(part, name).unfreeze(keys=["a", "b"], recurse=False)
    value, gradients = nn.value_and_grad(beside, loss)(beside, tokens)
    other, whole = nn.value_and_grad(within, loss)(within, tokens)
    assert mx.abs(value - other).item() < 1e-5
    found, expected = dict(utils.tree_flatten(gradients)), dict(utils.tree_flatten(whole))
    assert len(found) == 2 * len(places(beside))
    for path in {path.rpartition(".")[0] for path in found}:
        layer, part, name = path.split(".")[2:]
        module, weight = (
            getattr(getattr(beside.layers[int(layer)], part), name),
            expected[f"{path}.weight"],
        )
        for gradient, wanted in (
            (found[f"{path}.a"], (module.b @ weight).T),
            (found[f"{path}.b"], (weight @ module.a).T),
        ):
            assert (
                mx.abs(gradient - wanted).max().item() < 1e-5 + 1e-3 * mx.abs(wanted).max().item()
            ), path


def test_gradients_of_norms_and_embeddings_are_those_of_differences():
    model, size = random_model(seed=1), 1e-2
    _, gradients = nn.value_and_grad(model, loss)(model, TOKENS)
    for name, gradient in utils.tree_flatten(gradients):
        if "norm" in name or "embeddings" in name:
            place = tuple(
                int(i) for i in divmod(mx.argmax(mx.abs(gradient)).item(), gradient.shape[-1])
            )[-gradient.ndim :]
            kept, values = dict(utils.tree_flatten(model.parameters()))[name], []
            for way in (size, -size):
                changed = mx.array(kept)
                changed[place] = changed[place] + way
                model.load_weights([(name, changed)], strict=False)
                values.append(loss(model, TOKENS))
            model.load_weights([(name, kept)], strict=False)
            difference, exact = (
                ((values[0] - values[1]) / (2 * size)).item(),
                gradient[place].item(),
            )
            assert abs(difference - exact) < 0.05 * abs(exact) + 1e-3, name


def test_mlx_lms_caches_drive_the_model():
    from mlx_lm.models.cache import KVCache as Plain
    from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache

    model = random_model(seed=1)
    wanted = model(TOKENS)
    for make, most in (
        (Plain, 1e-4),
        (lambda: RotatingKVCache(64), 1e-4),
        (lambda: QuantizedKVCache(32, 8), 0.2),
    ):
        caches = [make() for _ in model.layers]
        parts = [
            model(TOKENS[:, start : start + length], caches)
            for start, length in ((0, 4), (4, 1), (5, 3))
        ]
        assert mx.abs(mx.concatenate(parts, axis=1) - wanted).max().item() < most


@pytest.mark.parametrize("mode", ["affine", "mxfp4", "nvfp4"])
@pytest.mark.parametrize("layer", [Linear(64, 96), Embedding(96, 64)], ids=["matrix", "tied"])
def test_many_rows_through_a_quantized_matrix_are_each_row_alone(layer, mode):
    packed = layer.to_quantized(mode=mode)
    project = packed.as_linear if isinstance(layer, Embedding) else packed
    x = mx.random.normal((3, MANY, 64), key=mx.random.key(7))
    alone = mx.stack([mx.concatenate([project(row[None]) for row in rows]) for rows in x])
    assert project(x).dtype == x.dtype and mx.allclose(project(x), alone, atol=1e-5)
