"""Gradients in float64, by NumPy alone: arrays that know what they were computed from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
Backward = Callable[[Array], Array]


class Var:
    """An array, and for each that it was computed from how a gradient passes to that."""

    def __init__(self, value: Any, sources: Sequence[tuple[Var, Backward]] = ()) -> None:
        self.value: Array = np.asarray(value, np.float64)
        self.sources = sources

    @property
    def T(self) -> Var:
        return Var(self.value.swapaxes(-1, -2), [(self, lambda g: g.swapaxes(-1, -2))])

    def __add__(self, other: Any) -> Var:
        other = var(other)
        return Var(self.value + other.value, [(self, lambda g: g), (other, lambda g: g)])

    def __mul__(self, other: Any) -> Var:
        other = var(other)
        back = [(self, lambda g: g * other.value), (other, lambda g: g * self.value)]
        return Var(self.value * other.value, back)

    def __sub__(self, other: Any) -> Var:
        return self + var(other) * -1.0

    def __matmul__(self, other: Any) -> Var:
        other = var(other)
        a, b = self.value, other.value
        left, right = (lambda g: g @ b.swapaxes(-1, -2)), (lambda g: a.swapaxes(-1, -2) @ g)
        return Var(a @ b, [(self, left), (other, right)])

    def __pow__(self, power: float) -> Var:
        return self.each(self.value**power, power * self.value ** (power - 1))

    def __getitem__(self, place: Any) -> Var:
        def back(g: Array) -> Array:
            full = np.zeros_like(self.value)
            np.add.at(full, place, g)
            return full

        return Var(self.value[place], [(self, back)])

    def each(self, value: Array, slope: Array) -> Var:
        """Return a function of each number, by its values and its slopes."""
        return Var(value, [(self, lambda g: g * slope)])

    def reshape(self, *shape: int) -> Var:
        return Var(self.value.reshape(*shape), [(self, lambda g: g.reshape(self.value.shape))])

    def swapaxes(self, a: int, b: int) -> Var:
        return Var(self.value.swapaxes(a, b), [(self, lambda g: g.swapaxes(a, b))])

    def sum(self, axis: int | None = None) -> Var:
        """Return the sum, with the axis kept."""
        value = self.value.sum(axis, keepdims=axis is not None)
        return Var(value, [(self, lambda g: np.broadcast_to(g, self.value.shape))])

    def exp(self) -> Var:
        value = np.exp(self.value)
        return self.each(value, value)

    def log(self) -> Var:
        return self.each(np.log(self.value), 1 / self.value)


def var(value: Any) -> Var:
    return value if isinstance(value, Var) else Var(value)


def log_softmax(x: Var) -> Var:
    """Return the logarithms of the probabilities along the last axis."""
    shifted = x - np.max(x.value, -1, keepdims=True)
    return shifted - shifted.exp().sum(-1).log()


def sigmoid(x: Var) -> Var:
    value = 1 / (1 + np.exp(-x.value))
    return x.each(value, value * (1 - value))


def gradients(of: Var, by: dict[str, Var]) -> dict[str, Array]:
    """Return the gradient of a number by each of the variables, as far as it depends on them."""
    order: list[Var] = []
    seen: set[int] = set()

    def visit(one: Var) -> None:
        if id(one) not in seen:
            seen.add(id(one))
            for source, _ in one.sources:
                visit(source)
            order.append(one)

    visit(of)
    found: dict[int, Array] = {id(of): np.ones_like(of.value)}
    for one in reversed(order):
        for source, back in one.sources:
            part = summed(back(found[id(one)]), source.value.shape)
            found[id(source)] = found.get(id(source), 0) + part
    return {name: found.get(id(one), np.zeros_like(one.value)) for name, one in by.items()}


def summed(gradient: Array, shape: tuple[int, ...]) -> Array:
    """Return a gradient summed over what was broadcast from `shape`."""
    gradient = gradient.sum(tuple(range(gradient.ndim - len(shape))))
    ones = tuple(axis for axis, size in enumerate(shape) if size == 1)
    return gradient.sum(ones, keepdims=True) if ones else gradient
