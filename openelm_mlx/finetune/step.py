"""One step: the loss of a batch and its gradients, clipped, into the optimizer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from openelm_mlx.device import mx, nn, utils
from openelm_mlx.finetune.batches import Batch
from openelm_mlx.finetune.forward import token_losses
from openelm_mlx.finetune.optimizer import new_optimizer
from openelm_mlx.finetune.options import FinetuneOptions
from openelm_mlx.model.decoder import OpenELM

Loss = Callable[[OpenELM, Batch], tuple[mx.array, mx.array]]
"""The sum over what a batch trains (tokens, pairs), and how many these are."""


def cross_entropy(model: OpenELM, batch: Batch) -> tuple[mx.array, mx.array]:
    """Return the sum of the losses of the trained tokens in nats, and their number."""
    return (token_losses(model, batch) * batch.weights).sum(), batch.weights.sum()


class Step:
    """The compiled parts of a step on a model.

    Gradients of several batches, and of several processes, are sums that are divided once by the
    number of what they train, so a token counts as much wherever it stands.
    """

    def __init__(
        self, model: OpenELM, options: FinetuneOptions, loss: Loss = cross_entropy
    ) -> None:
        self.model, self.options = model, options
        self.optimizer = new_optimizer(options)
        self.optimizer.init(model.trainable_parameters())
        self._gradients = nn.value_and_grad(model, loss)
        self._loss = loss

    def gradients(self, batch: Batch, key: mx.array) -> tuple[mx.array, mx.array, Any]:
        """Return the sum of the losses, the number of what is trained, and summed gradients."""
        (total, count), grads = self._gradients(self.model, batch)
        return total, count, grads

    def update(self, grads: Any, count: mx.array, rate: float) -> mx.array:
        """Take a step along summed gradients; return the norm of their mean before clipping."""
        grads = utils.tree_map(lambda grad: grad / count, grads)
        every: Any = utils.tree_flatten(grads)
        norm = mx.sqrt(mx.stack([grad.square().sum() for _, grad in every]).sum())
        if self.options.clip:
            by = mx.minimum(self.options.clip / (norm + 1e-6), 1.0)
            grads = utils.tree_map(lambda grad: grad * by, grads)
        self.optimizer.learning_rate = rate
        self.optimizer.update(self.model, grads)
        return norm

    def evaluate(self, batch: Batch) -> tuple[mx.array, mx.array]:
        """Return the sum of the losses and the number of what they are of, without gradients."""
        return self._loss(self.model, batch)
