"""Products with matrices: plain ones, and quantized ones."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from openelm_mlx.device import kind, mx, nn

MANY = 8  # rows: from there on a processor unpacks a quantized matrix


def for_any_thread(array: mx.array) -> mx.array:
    """Start computing an array that a module keeps: before that, only this thread may use it."""
    # inside a transformation such as mx.compile, or while a graph is told, it cannot be computed
    with suppress(ValueError, RuntimeError):
        mx.async_eval(array)
    return array


class Transposed(nn.Module):
    """A module that transposes its weight once instead of at every token."""

    def __init__(self, *shape: int, **options: Any) -> None:
        super().__init__(*shape, **options)  # of nn.Linear or nn.Embedding
        self._cached: tuple[mx.array, ...] = ()

    def transposed(self) -> mx.array:
        """Return the weight [output, input] as a view [input, output].

        The view is cached until the module gets another weight.
        """
        if not self._cached or self._cached[0] is not self.weight:
            self._cached = (self.weight, for_any_thread(self.weight.T))
        view: mx.array = self._cached[1]
        return view


class Packed(nn.Module):
    """A quantized matrix. A processor unpacks it first where there are many rows: MLX's product of
    packed weights takes row by row there, ten times as long for 64 rows of the bundled model.
    """

    def product(self, x: mx.array) -> mx.array:
        """Return the product with the transposed matrix [output, input]."""
        settings = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        packed = self.weight, self.scales, self.biases
        if x.size < MANY * x.shape[-1] or x.dtype != mx.float32 or kind() != "cpu":
            return mx.quantized_matmul(x, *packed, **settings)
        return x @ mx.dequantize(*packed, **settings).astype(x.dtype).T


class PackedLinear(Packed, nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        return self.product(x)


class PackedEmbedding(Packed, nn.QuantizedEmbedding):
    def as_linear(self, x: mx.array) -> mx.array:
        return self.product(x)


class Linear(Transposed, nn.Linear):
    """A projection without bias."""

    def __init__(self, input_dims: int, output_dims: int) -> None:
        super().__init__(input_dims, output_dims, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return x @ self.transposed()

    def to_quantized(self, *how: Any, **settings: Any) -> PackedLinear:
        """Return this layer quantized, which is what `nn.quantize` calls."""
        return PackedLinear.from_linear(self, *how, **settings)


class Embedding(Transposed, nn.Embedding):
    """The embedding of the tokens, which is the head too if the two are tied."""

    def as_linear(self, x: mx.array) -> mx.array:
        """Return the logits [..., vocab] of hidden states [..., model_dim]."""
        return x @ self.transposed()

    def to_quantized(self, *how: Any, **settings: Any) -> PackedEmbedding:
        """Return this layer quantized, which is what `nn.quantize` calls."""
        return PackedEmbedding.from_embedding(self, *how, **settings)


def sums(projection: nn.Module) -> bool:
    """Return whether a projection needs no kernel for the sum of a residual and its product."""
    return type(projection) is Linear or getattr(projection, "sums", False)


def project_onto(residual: mx.array, projection: nn.Module, x: mx.array) -> mx.array:
    """Return residual + projection(x), by one kernel if the projection is a plain matrix.

    Any other module is called, or asked for the sum if it has a way of its own (adapters.py).
    """
    if type(projection) is Linear:
        return mx.addmm(residual, x, projection.transposed())
    if hasattr(projection, "onto"):
        return projection.onto(residual, x)
    return residual + projection(x)
