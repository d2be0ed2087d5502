"""The memory of a fine-tuning, predicted before its first step, and what is done if it is too much.

MLX tells the graph of a step without computing it; `graph/memory.py` goes through it as MLX would.
So the prediction follows the code that trains, whatever the method, and needs no formula of its
own. It is the peak of `mx.get_peak_memory`: arrays in use, not freed ones that MLX keeps. A
processor was measured (benchmarks/scripts/finetune_memory.py), Metal was not.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from operator import ge
from typing import Any, NamedTuple

from openelm_mlx import device
from openelm_mlx.device import mx, utils
from openelm_mlx.errors import FinetuneError
from openelm_mlx.finetune.batches import Batch, Shape, packed
from openelm_mlx.finetune.options import FinetuneOptions
from openelm_mlx.finetune.step import Step
from openelm_mlx.graph.gradients import floating, trace
from openelm_mlx.graph.memory import Pace, peak
from openelm_mlx.graph.trace import Graph, blank, fuse
from openelm_mlx.model.decoder import OpenELM
from openelm_mlx.settings import chip_name, command_limits

MADE = 4  # times what an update changes is the most that it makes on its way, with a wide margin


class Prediction(NamedTuple):
    """The bytes of a run at its peak, by what takes them."""

    weights: int  # that are not trained
    trained: int
    optimizer: int
    gradients: int
    activations: int  # and all else that a batch or an update computes on its way
    shape: Shape  # of the batch that takes the most

    @property
    def total(self) -> int:
        return sum(self[:5])

    def __str__(self) -> str:
        parts = zip(self._fields[:5], self[:5], strict=True)
        named = ", ".join(f"{name} {size_of(size)}" for name, size in parts)
        return f"{size_of(self.total)} ({named})"

    def as_dict(self) -> dict[str, Any]:
        """Return what finetune.json keeps."""
        return {**self._asdict(), "shape": self.shape._asdict(), "total": self.total}


class Fit(NamedTuple):
    """Options with which a run fits into memory, and what it takes."""

    options: FinetuneOptions
    predicted: Prediction
    notice: str  # what was changed; empty if nothing was


def fitted(
    step_of: Callable[[FinetuneOptions], Step],
    options: FinetuneOptions,
    shapes_of: Callable[[FinetuneOptions], Iterable[Shape]],
    available: int | None = None,
    kept: int = 0,
) -> Fit:
    """Return the options with the largest batch that fits, at most their own.

    `step_of` returns the step of options, `shapes_of` the shapes of its batches; nothing of either
    is computed. Smaller batches are accumulated, so that the steps stay the same. `available` is by
    default what MLX should use on this device, `kept` what is held besides. Raises `FinetuneError`
    if not even a batch of one row fits, and names what would.
    """
    most = device.recommended_bytes() if available is None else available
    step = step_of(options)
    smaller, found = options, predict(step, options, shapes_of(options), kept)
    needed = found.total
    for batch in range(options.rows, 0, -1):
        if options.rows % batch:
            continue
        times = options.rows // batch
        if times > 1:
            smaller = replace(options, batch=batch, accumulate=times * options.accumulate)
            found = predict(step, smaller, shapes_of(smaller), kept)
        if found.total <= most:
            what = f"A batch of {options.rows} needs about {size_of(needed)}"
            now = f"{times} batches of {batch} are computed instead (about {size_of(found.total)})."
            notice = f"{what}, and there are {size_of(most)}; {now}" if times > 1 else ""
            return Fit(smaller, found, notice)
    what = f"training needs about {found} for one row of {found.shape.length} tokens"
    remedy = ways(found, most, step, step_of, smaller, kept)
    raise FinetuneError(f"{what}, and there are {size_of(most)}; {remedy}")


def ways(
    found: Prediction,
    most: int,
    step: Step,
    step_of: Callable[[FinetuneOptions], Step],
    options: FinetuneOptions,
    kept: int,
) -> str:
    """Return what a user can do, with the bytes that each way would take."""
    shape = found.shape
    half = shape._replace(length=shape.length // 2, trained=-(-shape.trained // 2))
    ways = {"half the --length": predict(step, options, [half], kept).total}
    if not options.gradient_checkpointing:
        other = replace(options, gradient_checkpointing=True)
        ways["--gradient-checkpointing"] = predict(step_of(other), other, [shape], kept).total
    if options.method == "full":
        ways["--method lora"] = found.total - found.optimizer - found.gradients
    elif saved := found.weights - at_four_bits(step.model):
        ways["--bits 4"] = found.total - saved
    texts = [f"{way} ({size_of(total)})" for way, total in ways.items() if total <= most]
    if texts:
        return f"it fits with {' or '.join(texts)}"
    tried = ", ".join(f"{way} ({size_of(total)})" for way, total in ways.items())
    return f"none of {tried} is enough by itself: use several, or a smaller model"


def at_four_bits(model: OpenELM) -> int:
    """Return the bytes of all parameters that are not trained with their matrices in 4 bits."""
    trained = {id(array) for array in arrays_of(model.trainable_parameters())}
    return sum(
        array.size * 9 // 16 if array.ndim == 2 and floating(array) else array.nbytes
        for array in arrays_of(model.parameters())
        if id(array) not in trained
    )


def predict(
    step: Step, options: FinetuneOptions, shapes: Iterable[Shape], kept: int = 0
) -> Prediction:
    """Return the peak of a run on batches of these shapes. Nothing is computed.

    Evaluation takes less: the same pass, of which nothing is kept for gradients.
    """
    trained, state = (bytes_of(tree) for tree in trained_by(step))
    weights = bytes_of(step.model.parameters()) - trained + kept
    # gradients are as large as what is trained; those of a step's earlier batches wait in a sum
    sums = trained * (1 + (options.accumulate > 1))
    pace = pace_here()
    with unmade(step):
        peaks = [(peak(gradients(step, shape), (), pace), shape) for shape in largest(shapes)]
        most, shape = max(peaks)
        most += sums - trained
        if most < sums + MADE * (trained + state):  # else no update can take more
            most = max(most, peak(*updates(step), pace) - trained - state)
    return Prediction(weights, trained, state, sums, max(0, most - sums), shape)


def largest(shapes: Iterable[Shape]) -> list[Shape]:
    """Return the shapes than which no other one is larger in every way."""
    found: list[Shape] = []
    for shape in sorted(set(shapes), key=sizes, reverse=True):
        if not any(all(map(ge, sizes(other), sizes(shape))) for other in found):
            found.append(shape)
    return found


def sizes(shape: Shape) -> tuple[int, ...]:
    return shape.rows * shape.length, shape.length, shape.trained


def pace_here() -> Pace:
    """Return how far MLX is ahead on this device."""
    if device.kind() != "metal":
        return Pace()
    return Pace.of_metal(command_limits(chip_name(), os.environ))


# --- graphs of a step, and arrays


def gradients(step: Step, shape: Shape) -> Graph:
    """Return the graph of the gradients of a batch."""
    batch, parameters = packed([], shape), step.model.trainable_parameters()
    key = mx.random.key(0)
    mx.eval(key)

    def run(*arrays: mx.array) -> Any:
        left = iter(arrays[len(batch) :])
        step.model.update(utils.tree_map(lambda _: next(left), parameters))
        return step.gradients(Batch(*arrays[: len(batch)]), key)

    return graph_of(run, *batch, *arrays_of(parameters))


def updates(step: Step) -> tuple[Graph, set[str]]:
    """Return the graph of an update, and the names of its inputs, which nobody else holds."""
    trees = [*trained_by(step), step.model.trainable_parameters()]  # and gradients like these

    def update(*leaves: mx.array) -> Any:
        left = iter(leaves)
        parameters, state, grads = (utils.tree_map(lambda _: next(left), tree) for tree in trees)
        step.model.update(parameters)
        step.optimizer.state = state
        return step.update(grads, mx.array(1.0), 1e-4), *trained_by(step)

    graph = graph_of(update, *(array for tree in trees for array in arrays_of(tree)))
    return graph, {array.name for array in graph.inputs}


def graph_of(function: Callable[..., Any], *arrays: mx.array) -> Graph:
    """Return the graph of a part of a step; a step is compiled as step.py says."""

    def arrays_made(*given: mx.array) -> list[mx.array]:
        return arrays_of(function(*given))

    try:
        graph = trace(arrays_made, *arrays)
    except ValueError:  # MLX does not tell of some GPU's primitive: take those of a processor
        with mx.stream(mx.cpu):
            graph = trace(arrays_made, *arrays)
    return graph if device.on_processor() else fuse(graph)


@contextmanager
def unmade(step: Step) -> Iterator[None]:
    """Put arrays without memory in the places of those that training changes."""
    parameters, state = trained_by(step)
    step.model.update(utils.tree_map(lambda array: blank(array.shape, array.dtype), parameters))
    step.optimizer.state = utils.tree_map(lambda array: blank(array.shape, array.dtype), state)
    try:
        yield
    finally:
        step.model.update(parameters)
        step.optimizer.state = state


def trained_by(step: Step) -> tuple[Any, Any]:
    """Return the parameters that are trained, and the state of the optimizer."""
    return step.model.trainable_parameters(), step.optimizer.state


def arrays_of(tree: Any) -> list[mx.array]:
    leaves: Any = utils.tree_flatten(tree)
    return [leaf for _, leaf in leaves if isinstance(leaf, mx.array)]


def bytes_of(tree: Any) -> int:
    return sum({id(array): array.nbytes for array in arrays_of(tree)}.values())


def size_of(count: int) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
