"""One step: the loss of a batch and its gradients, clipped, into the optimizer.

Each part is a function of all that it reads and changes: nothing hidden decides what it computes,
and what is replaced lends its memory to what replaces it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from openelm_mlx.device import mx, on_processor, utils
from openelm_mlx.finetune.batches import Batch
from openelm_mlx.finetune.forward import Training, token_losses
from openelm_mlx.finetune.optimizer import new_optimizer
from openelm_mlx.finetune.options import FinetuneOptions
from openelm_mlx.graph.gradients import value_and_grad
from openelm_mlx.model.adapters import dropout
from openelm_mlx.model.decoder import OpenELM


class Sums(NamedTuple):
    """Sums over what a batch trains: tokens, or pairs."""

    total: mx.array  # of the losses
    count: mx.array  # type: ignore[assignment]  # tuples have a method of this name
    extra: dict[str, mx.array]  # of what else is worth knowing


Loss = Callable[[OpenELM, Batch, Training | None], Sums]
"""What a loss computes; it is told what a pass of training has, and None for an evaluation."""


def cross_entropy(model: OpenELM, batch: Batch, training: Training | None = None) -> Sums:
    """Return the sum of the losses of the trained tokens in nats, and their number."""
    losses = token_losses(model, batch, training)
    return Sums((losses * batch.weights).sum(), batch.weights.sum(), {})


class Step:
    """The compiled parts of a step on a model.

    Gradients of several batches, and of several processes, are sums that are divided once by the
    number of what they train, so a token counts as much wherever it stands.
    """

    def __init__(
        self, model: OpenELM, options: FinetuneOptions, loss: Loss = cross_entropy
    ) -> None:
        self.model, self.options, self.loss = model, options, loss
        self.optimizer = new_optimizer(options)
        self.optimizer.init(model.trainable_parameters())
        self._compiled = [compiled(part) for part in (self._gradients, self._update, self._sums)]

    def gradients(
        self, batch: Batch, key: mx.array, before: tuple[Sums, Any] | None = None
    ) -> tuple[Sums, Any]:
        """Return sums over a batch and the gradients of their total.

        `key` decides what dropout leaves out. `before` is what an earlier batch of the same step
        gave, which is added.
        """
        gradients, _, _ = self._compiled
        sums, grads = gradients(self.model.trainable_parameters(), batch, key, before)
        return Sums(*sums), grads

    def update(self, grads: Any, count: mx.array, rate: float) -> mx.array:
        """Take a step along summed gradients; return the norm of their mean before clipping.

        Nothing changes if the norm is not finite.
        """
        (_, update, _), optimizer = self._compiled, self.optimizer
        now = self.model.trainable_parameters(), optimizer.state
        parameters, optimizer.state, norm = update(*now, grads, count, mx.array(rate))
        self.model.update(parameters)
        return norm

    def evaluate(self, batch: Batch) -> Sums:
        """Return sums over a batch, without gradients."""
        _, _, sums = self._compiled
        return Sums(*sums(self.model.trainable_parameters(), batch, None))

    def _sums(self, parameters: Any, batch: Any, training: Training | None) -> Sums:
        kept = self.model.trainable_parameters()
        self.model.update(parameters)
        try:
            return self.loss(self.model, Batch(*batch), training)
        finally:
            self.model.update(kept)

    def _gradients(self, parameters: Any, batch: Any, key: mx.array, before: Any) -> Any:
        training = Training(self.options.gradient_checkpointing, self.options.z_loss)
        with dropout(self.model, self.options.dropout, key):
            sums, grads = value_and_grad(self._sums)(parameters, batch, training)
        found = Sums(*sums), grads
        return found if before is None else utils.tree_map(mx.add, found, before)

    def _update(
        self, parameters: Any, state: Any, grads: Any, count: mx.array, rate: mx.array
    ) -> Any:
        # in the type of the weights, which would become float32 with their gradients
        share = 1 / mx.maximum(count, 1)
        grads = utils.tree_map(lambda grad: (grad * share).astype(grad.dtype), grads)
        every: Any = utils.tree_flatten(grads)
        # row by row: a processor's sum over a whole embedding loses 1.5 % (32,000 x 1,280)
        rows = [grad.astype(mx.float32).square().sum(axis=-1) for _, grad in every]
        norm = mx.sqrt(sum(row.sum() for row in rows))
        if self.options.clip:
            by = mx.minimum(self.options.clip / (norm + 1e-6), 1.0)
            grads = utils.tree_map(lambda grad: grad * by.astype(grad.dtype), grads)
        optimizer = new_optimizer(self.options)
        optimizer.state = utils.tree_map(lambda leaf: leaf, state)  # the containers of it are new
        optimizer.learning_rate = rate
        found = optimizer.apply_gradients(grads, parameters), optimizer.state
        finite = mx.isfinite(norm)
        parameters, state = utils.tree_map(
            lambda new, old: mx.where(finite, new, old), found, (parameters, state)
        )
        return parameters, state, norm


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function as one graph for a GPU, which then launches fewer kernels.

    A processor gains nothing over the small functions that are compiled anyway (2 rows of 256
    tokens of the bundled model: 0.61 s of CPU time as a whole, 0.56 s in parts), and would first
    build every fused kernel by a C++ compiler.
    """
    return function if on_processor() else mx.compile(function)
