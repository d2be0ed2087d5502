"""Losses of quantized matrices: what each costs alone, and what a whole plan costs.

The loss of a change is the mean KL divergence of the next-token distributions, exact model against
a model in which only that is changed. Changed models go through the layers together, each from the
layer where it first differs: a layer is read once for all of them, and memory has a layer at a
time, not a model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from openelm_mlx.convert.quantize import (
    NORM,
    LazyWeights,
    Weights,
    embedded,
    head,
    head_stem,
    head_weights,
    in_batches,
    last_states,
    normed,
    of_layer,
    through,
)
from openelm_mlx.convert.quantize.rounding import fitted_weights, rounded
from openelm_mlx.convert.sources import number_of
from openelm_mlx.device import mx
from openelm_mlx.dtypes import DTYPES
from openelm_mlx.evaluate.compare import kl_divergence
from openelm_mlx.evaluate.score import POSITIONS
from openelm_mlx.model.config import HEAD, OpenELMConfig
from openelm_mlx.quantization import BITS, Plan, QuantSpec, all_specs, matrices, planned, stem_of

if TYPE_CHECKING:
    from openelm_mlx.convert.options import Progress

Spec = QuantSpec | None  # None: not quantized
Losses = dict[str, dict[Spec, float]]  # stem -> spec -> mean KL divergence in nats
Rounding = Callable[[str, mx.array, Spec], mx.array]  # of a matrix by its stem, in float32
States = list[mx.array]  # for each batch the input of a layer, [rows, length, model_dim]
BATCH = 4  # rows of tokens in one pass: bounds the memory of activations
STATES = 512 << 20  # bytes of states, of the models that go through the layers together
ROWS = 512  # of a matrix, on which its rounding errors are taken
NEAR = 1.5  # bits from the target that are measured; the loss of others follows from their error


def nearest(dtype: str) -> Rounding:
    """Return the rounding to the nearest values of a spec, with scales stored in `dtype`."""
    return lambda stem, array, spec: rounded(array, spec, DTYPES[dtype].mlx)


def fitted(dtype: str) -> Rounding:
    """Return the rounding to the nearest values of grids fitted to the weights."""
    return lambda stem, array, spec: fitted_weights(array, spec, DTYPES[dtype].mlx)


def rounded_weights(weights: Weights, plan: Plan, rounding: Rounding) -> LazyWeights:
    """Return the float32 weights that these stand for once they are stored as planned."""

    def read(name: str) -> mx.array:
        return rounding(stem_of(name), weights[name], planned(plan, name))

    return LazyWeights(weights, read)


@dataclass(frozen=True)
class Reference:
    """The exact model on calibration tokens, with which changed models are compared."""

    config: OpenELMConfig
    weights: Weights  # read layer by layer, so that they may be lazy
    batches: tuple[mx.array, ...]  # token ids [rows, length]
    states: States  # for each batch the output of the last layer
    moments: Mapping[str, mx.array]  # stem -> mean square of each input column, [columns]

    def loss(self, weights: Weights, progress: Progress | None = None) -> float:
        """Return the mean KL divergence in nats of the model that has these weights."""
        layers = self.config.num_transformer_layers

        def tell(number: int) -> None:
            if progress is not None:
                progress(number + 1, layers, f"measuring all together, layer {number}")

        states = last_states(self.config, weights, self.batches, progress=tell)
        return self.divergences(head_weights(self.config, weights), [states])[0]

    def losses_of(
        self,
        changes: Sequence[Plan],
        rounding: Rounding,
        around: Plan | None = None,
        progress: Progress | None = None,
    ) -> list[float]:
        """Return the mean KL divergence in nats of one model for each of `changes`.

        A change is a plan of one matrix, or of several: the model has these in these specs, rounded
        by `rounding`, and all other tensors exactly, or stored as the plan `around` has them.

        >>> reference.losses_of([{stem: QuantSpec(3)}, {stem: QuantSpec(4)}], nearest("float16"))
        [0.0094, 0.0021]
        """
        common = self.weights
        if around is not None:
            common = rounded_weights(self.weights, around, rounding)
        return Changed(self, changes, rounding, common, progress).losses()

    def divergences(self, own: Weights, models: Sequence[States]) -> list[float]:
        """Return the loss of models with the same head, of weights `own`, by their last states.

        Logits exist for some positions at a time: those of the exact model once for all models.
        """
        exact, sums = head_weights(self.config, self.weights), [0.0] * len(models)
        for place, states in enumerate(self.states):
            for start in range(0, self.batches[place].size, POSITIONS):
                known = logits_from(self.config, exact, states, start)
                mx.eval(known)
                for number, changed in enumerate(models):
                    other = logits_from(self.config, own, changed[place], start)
                    divergence: Any = kl_divergence(known, other).sum().item()
                    sums[number] += divergence
        return [total / sum(tokens.size for tokens in self.batches) for total in sums]


def logits_from(config: OpenELMConfig, weights: Weights, states: mx.array, start: int) -> mx.array:
    """Return the logits [positions, vocab] of last states, from position `start` of all rows on."""
    rows = states.reshape(-1, states.shape[-1])[start : start + POSITIONS]
    return head(config, weights, rows)


class Changed:
    """Models that differ from a common one in some matrices, and are run together."""

    def __init__(
        self,
        reference: Reference,
        changes: Sequence[Plan],
        rounding: Rounding,
        common: Weights,
        progress: Progress | None,
    ) -> None:
        self.reference, self.changes, self.rounding = reference, changes, rounding
        self.common, self.progress, self.done = common, progress, 0
        self.config, self.layers = reference.config, reference.config.num_transformer_layers
        starts = [[self.place(stem) for stem in change] for change in changes]
        self.starts = [min(own, default=self.layers) for own in starts]  # where each begins
        self.steps = sum(self.layers + 1 - max(start, 0) for start in self.starts)

    def place(self, stem: str) -> int:
        """Return the number of a matrix's layer: -1 for the embeddings, past the last for a head
        of its own.
        """
        return self.layers if stem == HEAD else number_of(stem)

    def losses(self) -> list[float]:
        """Return the loss of each model, in order."""
        found = [0.0] * len(self.changes)
        order = sorted(range(len(found)), key=self.starts.__getitem__)
        together = max(1, STATES // sum(x.nbytes for x in self.reference.states))
        states, reached = embedded(self.common, self.reference.batches), 0  # of the common model
        for begin in range(0, len(order), together):
            group = order[begin : begin + together]
            models, reached = self.run(group, states, reached)
            for number, loss in self.compared(models):
                found[number] = loss
        return found

    def run(
        self, group: Sequence[int], common: States, reached: int
    ) -> tuple[dict[int, States], int]:
        """Return the last states of a group of models, which begin in order.

        `common` are the common model's inputs of layer `reached`. They go on to the layer where the
        last of the group begins, which is returned too: the next group begins no earlier.
        """
        models: dict[int, States] = {}
        for layer in range(-1 if reached == 0 else reached, self.layers):
            weights = of_layer(self.common, layer) if layer >= 0 else {}
            for number in group:
                if self.starts[number] > layer:
                    continue
                own = weights | self.changed(number, layer)
                if layer < 0:
                    models[number] = embedded(own, self.reference.batches)
                    continue
                through(self.config, layer, own, models.setdefault(number, list(common)))
                self.tell(f"measuring layer {layer}")
            if 0 <= layer < self.starts[group[-1]]:
                through(self.config, layer, weights, common)
                reached = layer + 1
        return {number: models.get(number) or list(common) for number in group}, reached

    def compared(self, models: Mapping[int, States]) -> Iterator[tuple[int, float]]:
        """Yield the number and the loss of each model. Those with the common head share it."""
        stem = head_stem(self.config)
        groups = [[number for number in models if stem not in self.changes[number]]]
        groups += [[number] for number in models if stem in self.changes[number]]
        for group in filter(None, groups):
            own = {NORM: self.common[NORM], f"{stem}.weight": self.matrix(group[0], stem)}
            mx.eval(own)
            losses = self.reference.divergences(own, [models[number] for number in group])
            yield from zip(group, losses, strict=True)
            for number in group:
                self.tell(f"measuring the loss of {next(iter(self.changes[number]), 'no change')}")

    def changed(self, number: int, layer: int) -> dict[str, mx.array]:
        """Return the matrices of a layer in which a model differs."""
        found = {}
        for stem in self.changes[number]:
            if self.place(stem) == layer:
                found[f"{stem}.weight"] = self.matrix(number, stem)
                mx.eval(found)  # one after another: with each goes what it was rounded from
        return found

    def matrix(self, number: int, stem: str) -> mx.array:
        name, change = f"{stem}.weight", self.changes[number]
        if stem not in change:
            return self.common[name]
        return self.rounding(stem, self.reference.weights[name], change[stem])

    def tell(self, what: str) -> None:
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.steps, what)


def make_reference(
    config: OpenELMConfig,
    weights: Weights,
    tokens: mx.array,
    progress: Progress | None = None,
) -> Reference:
    """Run the exact model once on tokens [rows, length] and keep what later passes need."""
    batches, layers = tuple(in_batches(tokens, BATCH)), config.num_transformer_layers
    sums: dict[str, mx.array] = {}

    def hook(stem: str, x: mx.array) -> None:
        sums[stem] = sums.get(stem, mx.array(0.0)) + mx.square(x).sum(axis=0)
        mx.eval(sums[stem])

    def tell(number: int) -> None:
        if progress is not None:
            progress(number + 1, layers, "running the exact model")

    states, norm = last_states(config, weights, batches, hook, tell), {NORM: weights[NORM]}
    for x in states:
        hook(head_stem(config), normed(config, norm, x).reshape(-1, x.shape[-1]))
    moments = {stem: total / tokens.size for stem, total in sums.items()}
    return Reference(config, weights, batches, states, moments)


def measure(
    reference: Reference,
    shapes: Mapping[str, tuple[int, ...]],
    rounding: Rounding,
    target_bpw: float,
    progress: Progress | None = None,
    spread: float = 0.0,
) -> Losses:
    """Return the loss of every matrix in every spec whose groups divide its rows.

    Numbers of bits near the target are measured, the others derived. `spread` widens what counts as
    near, for targets this far around `target_bpw`.
    """
    stems = matrices(shapes)
    near = near_bits(target_bpw, spread)
    errors: dict[str, dict[Spec, float]] = {}
    probes: list[tuple[str, QuantSpec]] = []
    for number, (stem, shape) in enumerate(stems.items(), 1):
        specs: list[Spec] = [spec for spec in all_specs() if shape[1] % spec.group_size == 0]
        specs.append(None)  # a type of 16 bits may lose something too
        errors[stem] = rounding_errors(reference, stem, specs, rounding)
        group = next((size for size in (64, 32) if shape[1] % size == 0), 0)
        probes += [(stem, QuantSpec(bits, group)) for bits in near if group]
        if progress is not None:
            progress(number, len(stems), f"rounding {stem}")
    changes = [{stem: spec} for stem, spec in probes]
    found = reference.losses_of(changes, rounding, progress=progress)
    points: dict[str, list[tuple[float, float]]] = {stem: [] for stem in stems}
    for (stem, spec), loss in zip(probes, found, strict=True):
        points[stem].append((errors[stem][spec], max(loss, 1e-15)))
    return {
        stem: {spec: interpolated(points[stem], error) for spec, error in own.items()}
        for stem, own in errors.items()
    }


def near_bits(target_bpw: float, spread: float = 0.0) -> list[int]:
    """Return the numbers of bits that `measure` measures."""
    return [bits for bits in BITS if abs(bits - target_bpw) <= NEAR + spread] or [8]


def rounding_errors(
    reference: Reference, stem: str, specs: Sequence[Spec], rounding: Rounding
) -> dict[Spec, float]:
    """Return what `weighted_error` says of a matrix in each spec, from rows spread evenly over it:
    no group crosses a row.
    """
    exact, moments = reference.weights[f"{stem}.weight"], reference.moments.get(stem)
    rows = exact[:: -(-len(exact) // ROWS)]
    return {spec: weighted_error(rows, rounding(stem, rows, spec), moments) for spec in specs}


def weighted_error(exact: mx.array, other: mx.array, moments: mx.array | None) -> float:
    """Return the mean square error of the products with inputs of these second moments, were their
    columns independent.
    """
    square = mx.square(exact - other)
    mean: Any = (square if moments is None else square * moments).mean().item()
    return max(mean, 1e-30)


def interpolated(points: list[tuple[float, float]], error: float) -> float:
    """Return the loss at this error: straight lines through the measured points (error, loss), both
    on logarithmic scales.

    Beyond the points the loss is proportional to the error, as it is for small ones: both are
    quadratic.
    """
    points = sorted(points)
    if not points:
        return error
    if error <= points[0][0]:
        return points[0][1] * error / points[0][0]
    for (low, a), (high, b) in zip(points, points[1:], strict=False):
        if error <= high:
            share = math.log(error / low) / math.log(high / low) if high > low else 1.0
            return math.exp(math.log(a) * (1 - share) + math.log(b) * share)
    return points[-1][1] * error / points[-1][0]
