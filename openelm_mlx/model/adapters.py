"""Adapters: low-rank parts that are added to some of a model's matrices, and applied beside them.

    LoRA (arXiv:2106.09685)     W' = W + scale b a
    DoRA (arXiv:2402.09353)     the same, with every row scaled to its learned length

`adapted` makes a model whose matrices are those of another one, not copies of them. Where an
adapter has a part, a module of this file stands in the place of the projection or the embedding,
and computes W' x as W x + scale b (a x), so a quantized W stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

from openelm_mlx.device import mx, nn, utils
from openelm_mlx.errors import CheckpointError, naming
from openelm_mlx.model.checkpoint import check_finite
from openelm_mlx.model.config import EMBEDDINGS, HEAD, OpenELMConfig, expected_tensors
from openelm_mlx.model.decoder import OpenELM
from openelm_mlx.model.projections import for_any_thread, project_onto, sums
from openelm_mlx.quantization import matrices


@dataclass(frozen=True, eq=False)
class LowRank:
    """The part of an adapter for one matrix [rows, columns]; the arrays are float32."""

    a: mx.array  # [rank, columns]
    b: mx.array  # [rows, rank]
    scale: float
    magnitude: mx.array | None = None
    """The lengths of the adapted rows, [rows] (DoRA). PEFT's DoRA of an embedding states those of
    its columns, [1, columns].
    """

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    def merged(self, weight: mx.array) -> mx.array:
        """Return the adapted matrix in float32."""
        adapted = mx.addmm(weight.astype(mx.float32), self.b, self.a, alpha=self.scale)
        if self.magnitude is None:
            return adapted
        gain = self.magnitude / lengths(adapted, self.magnitude.ndim == 2)
        return adapted * (gain if gain.ndim == 2 else gain[:, None])


def lengths(matrix: mx.array, of_columns: bool = False) -> mx.array:
    """Return the lengths of the rows of a matrix, [rows], or of its columns, [1, columns]."""
    return mx.linalg.norm(matrix, axis=0 if of_columns else 1, keepdims=of_columns)


@dataclass(frozen=True, eq=False)
class Adapter:
    """The low-rank parts of an adapter by stem, as in `transformer.layers.3.ffn.proj_2`.

    `transformer.token_embeddings` is the input side, and `lm_head` the output side, of a tied
    model too: an adapter that leaves the two tied has the same `LowRank` under both.
    """

    name: str
    parts: Mapping[str, LowRank]
    base: str | None = None  # the fingerprint of its model, None if its files do not say
    instruct: bool = False  # trained on the Instruct format, whatever its base was

    @property
    def num_parameters(self) -> int:
        """The numbers of all parts; one that has two sides counts once."""
        parts = {id(part): part for part in self.parts.values()}.values()
        return sum(part.a.size + part.b.size + getattr(part.magnitude, "size", 0) for part in parts)

    def check(self, config: OpenELMConfig) -> None:
        """Raise `CheckpointError` unless every part fits a matrix of such a model, in numbers."""
        shapes = matrices(expected_tensors(config))
        shapes.setdefault(HEAD, shapes[EMBEDDINGS])
        for stem, part in self.parts.items():
            if stem not in shapes:
                what = f"the adapter {self.name} changes {stem:.100}, which this model lacks"
                raise CheckpointError(f"{what}; give an adapter that was made for it")
            rows, columns = shapes[stem]
            m = part.magnitude
            of_columns = m is not None and m.shape == (1, columns) and stem == EMBEDDINGS
            fits = m is None or m.shape == (rows,) or of_columns
            if not fits or [part.a.shape, part.b.shape] != [
                (part.rank, columns),
                (rows, part.rank),
            ]:
                what = f"the adapter {self.name} was made for another model: its {stem} adds"
                theirs = f"{part.b.shape} times {part.a.shape}"
                raise CheckpointError(f"{what} {theirs}, to {rows} x {columns} here; give its own")
            leaves = {"A": part.a, "B": part.b} | (
                {} if part.magnitude is None else {"magnitude": part.magnitude}
            )
            with naming(f"the adapter {self.name}"):
                check_finite({f"{leaf} of {stem}": array for leaf, array in leaves.items()}, {})


class Adapted(nn.Module):
    """A projection, plain or quantized, with a low-rank part beside it.

    The parameters `a`, `b` and `m` can be trained while `base` is frozen. As in DoRA, section 4.3,
    no gradient passes through the length of a row.
    """

    def __init__(self, base: nn.Module, part: LowRank, dtype: mx.Dtype) -> None:
        super().__init__()
        self.base, self.scale = base, part.scale
        self.a, self.b = part.a.astype(dtype), part.b.astype(dtype)
        if part.magnitude is not None:
            self.m = part.magnitude
        self._cached: tuple[mx.array, ...] = ()
        self._dropout: tuple[float, mx.array] | None = None  # from `dropout`

    @property
    def low_rank(self) -> LowRank:
        """The part as it is now, in float32."""
        a, b = self.a.astype(mx.float32), self.b.astype(mx.float32)
        return LowRank(a, b, self.scale, self.get("m"))

    def gain(self) -> mx.array:
        """Return the learned length of each row of W' over that of W + scale b a, [rows], or of
        each column, [1, columns].

        It is cached until the module gets other parameters.
        """
        now = (self.a, self.b, self.m, self.base.weight)
        if not self._cached or any(a is not b for a, b in zip(now, self._cached, strict=False)):
            low = self.low_rank
            adapted = LowRank(low.a, low.b, low.scale).merged(dense(self.base))
            found = mx.stop_gradient(lengths(adapted, self.m.ndim == 2))
            self._cached = (*now, for_any_thread(self.m / found))
        return self._cached[-1]

    def beside(self, y: mx.array, x: mx.array) -> mx.array:
        """Return W' x [..., rows] where `y` is W x and `x` is [..., columns]."""
        low = x if self._dropout is None else dropped(x, *self._dropout)
        out = mx.addmm(y, low @ self.a.T, self.b.T, alpha=self.scale)
        return (out * self.gain() if "m" in self else out).astype(y.dtype)

    def __call__(self, x: mx.array) -> mx.array:
        return self.beside(self.base(x), x)

    @property
    def sums(self) -> bool:
        """True if `onto` needs no kernel for the sum."""
        return "m" not in self and sums(self.base)

    def onto(self, residual: mx.array, x: mx.array) -> mx.array:
        """Return residual + W' x."""
        if "m" in self:
            return residual + self(x)
        return self.beside(project_onto(residual, self.base, x), x)


class AdaptedEmbedding(Adapted):
    """The embedding with a low-rank part on its input side; `as_linear` has it too if `tied`.

    Vectors are in the type `out`: MLX gives those of some quantized embeddings in another one.
    """

    def __init__(
        self, base: nn.Module, part: LowRank, dtype: mx.Dtype, out: mx.Dtype, tied: bool
    ) -> None:
        super().__init__(base, part, dtype)
        self.out, self.tied = out, tied

    def __call__(self, tokens: mx.array) -> mx.array:
        rows = mx.addmm(self.base(tokens), self.b[tokens], self.a, alpha=self.scale)
        if "m" in self:
            gain = self.gain()
            rows = rows * (gain if gain.ndim == 2 else gain[tokens][..., None])
        return rows.astype(self.out)

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the logits [..., vocab] of hidden states [..., model_dim]."""
        y = self.base.as_linear(x)
        return self.beside(y, x) if self.tied else y


class AdaptedHead(Adapted):
    """The embedding as a head, with a low-rank part that its input side does not have."""

    def __call__(self, x: mx.array) -> mx.array:
        return self.beside(self.base.as_linear(x), x)


@contextmanager
def dropout(model: nn.Module, share: float, key: mx.array) -> Iterator[None]:
    """Let the low-rank parts of projections leave out a share of their inputs, as PEFT does.

    What a projection leaves out follows from the key and its place in the model alone, so a pass
    that is computed again leaves out the same.
    """
    parts = [module for module in model.modules() if type(module) is Adapted] if share else []
    for part, own in zip(parts, mx.random.split(key, len(parts)) if parts else [], strict=True):
        part._dropout = share, own
    try:
        yield
    finally:
        for part in parts:
            part._dropout = None


def dropped(x: mx.array, share: float, key: mx.array) -> mx.array:
    """Return x with a share of its elements 0 and the others larger, so that means stay."""
    kept = mx.random.bernoulli(1 - share, x.shape, key=key)
    return mx.where(kept, x * (1 / (1 - share)), 0)


def dense(module: Any) -> mx.array:
    """Return the matrix of a projection or an embedding, [rows, columns] float32."""
    weight: mx.array = module.weight
    if "scales" in module:
        how = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}
        weight = mx.dequantize(weight, module.scales, module.get("biases"), **how)
    return weight.astype(mx.float32)


def adapted(model: OpenELM, adapter: Adapter, dtype: mx.Dtype | None = None) -> OpenELM:
    """Return a model that applies `adapter`, and otherwise shares the arrays of `model`.

    `dtype` is that of the low-rank parts, by default the one of the activations. Raises
    `CheckpointError` if a part does not fit the model.
    """
    adapter.check(model.args)
    out: mx.Dtype = model.transformer.norm.weight.dtype
    dtype = dtype or out
    new, parts = shells(model), dict(adapter.parts)
    tied = model.args.share_input_output_layers
    embedding, first = new.transformer.token_embeddings, parts.pop(EMBEDDINGS, None)
    if first is not None:
        both = tied and parts.get(HEAD) is first
        new.transformer.token_embeddings = AdaptedEmbedding(embedding, first, dtype, out, both)
        if both:
            del parts[HEAD]
    if tied and HEAD in parts:
        new.lm_head = AdaptedHead(embedding, parts.pop(HEAD), dtype)
    modules = dict(new.named_modules())
    places = [(stem, Adapted(modules[stem], part, dtype)) for stem, part in parts.items()]
    new.update_modules(utils.tree_unflatten(places))
    return new


def prepare(model: OpenELM) -> None:
    """Compute the parts of an adapted model before its first pass, one matrix at a time."""
    for module in model.modules():
        if isinstance(module, Adapted):
            mx.eval(module.a, module.b, module.gain() if "m" in module else [])


def shells(module: Any) -> Any:
    """Return a copy of a module and of those below it, with the same arrays."""
    new = copy(module)
    new._no_grad = set(module._no_grad)
    for name, child in module.items():
        if isinstance(child, nn.Module):
            new[name] = shells(child)
        elif isinstance(child, list):
            new[name] = [shells(one) if isinstance(one, nn.Module) else one for one in child]
    return new
