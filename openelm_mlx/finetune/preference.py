"""Preference tuning by DPO: of two answers to a prompt, one is to become likelier than the other.

The model must not move far from what it was, the reference. With h as what is between the answers,

    h = log p(chosen) / p_ref(chosen) - log p(rejected) / p_ref(rejected)

where p is the probability of a whole answer, the loss of a pair is

    sigmoid   log(1 + exp(-beta h))     DPO (arXiv:2305.18290, equation 7)
    hinge     max(0, 1 - beta h)        the hinge-norm loss of RSO (arXiv:2309.06657), as in TRL
    ipo       (h - 1 / (2 beta))^2      IPO (arXiv:2310.12036, equation 17)

IPO is here as it is published; TRL divides the log-probability of each answer by its length first.

The reference of an adapter is the model without it, whose arrays the two share, or for one that is
trained further the model with it as it was. If all weights are trained, it is a second copy of
them. Each step computes it on the same rows, so that both round alike, and before the model, so
that its memory is free by then.
"""

from __future__ import annotations

from collections.abc import Sequence

from openelm_mlx.device import mx, nn
from openelm_mlx.engine.loading import Engine
from openelm_mlx.finetune.batches import Batch
from openelm_mlx.finetune.examples import Example, Pair
from openelm_mlx.finetune.forward import Training, token_losses
from openelm_mlx.finetune.options import FinetuneOptions
from openelm_mlx.finetune.step import Loss, Sums, cross_entropy
from openelm_mlx.model.adapters import Adapted, shells
from openelm_mlx.model.decoder import OpenELM


def loss_of(
    engine: Engine, model: OpenELM, options: FinetuneOptions, examples: Sequence[Example | Pair]
) -> Loss:
    """Return the loss that these examples are trained with: of tokens, or of preference pairs.

    Called before the first step: the reference has the weights that `model` has then.
    """
    if not isinstance(examples[0], Pair):
        return cross_entropy
    reference = kept(engine.model, whole=model is engine.model)
    return preference_loss(reference, options.pair_loss, options.beta)


def kept(model: OpenELM, whole: bool) -> OpenELM:
    """Return a model that keeps the weights which `model` has now, for one that is trained from it:
    the `whole` of it, or the adapter that it applies.

    The memory is one until the first step makes other weights. The arrays are not the same, as a
    compiled function does not take one both as an input and as a constant.
    """
    new = shells(model)
    for module in new.modules():
        if whole or isinstance(module, Adapted):
            arrays = {name: one for name, one in module.items() if isinstance(one, mx.array)}
            module.update({name: mx.contiguous(array) for name, array in arrays.items()})
    mx.eval(new.parameters())
    return new


def note(engine: Engine, options: FinetuneOptions) -> str:
    """Return what is to be said of the memory of a reference before there is one, or ""."""
    if options.method != "full":
        return ""
    copy = f"a second copy of {engine.name}'s weights, {engine.nbytes / 1e6:,.0f} MB"
    return f"All weights are trained, so the reference of the preferences is {copy}."


def preference_loss(reference: OpenELM, kind: str, beta: float) -> Loss:
    """Return the loss of preference pairs.

    Beside it are sums of `reward_margin`, beta h, and of `reward_accuracy`, 1 where h > 0: rewards
    are beta log p / p_ref.
    """

    def loss(model: OpenELM, batch: Batch, training: Training | None = None) -> Sums:
        was = mx.stop_gradient(between(reference, batch))
        # first the one and then the other, so that what they compute is not in memory at once
        batch = batch._replace(tokens=mx.depends(batch.tokens, was))
        h = between(model, batch, training) - was
        there = (batch.counts[::2] > 0).astype(mx.float32)  # the last ones are no pairs
        losses = pair_losses(h, kind, beta)
        extra = {"reward_margin": beta * h, "reward_accuracy": (h > 0).astype(mx.float32)}
        sums = {name: mx.stop_gradient((value * there).sum()) for name, value in extra.items()}
        return Sums((losses * there).sum(), there.sum(), sums)

    return loss


def between(model: OpenELM, batch: Batch, training: Training | None = None) -> mx.array:
    """Return log p(chosen) - log p(rejected) of every pair, [pairs] float32."""
    losses = token_losses(model, batch, training) * batch.weights
    numbers = mx.arange(batch.counts.size)[:, None, None]
    # a sum in a fixed order, which adding by index is not on a GPU
    logprobs = -mx.where(batch.sequences == numbers, losses, 0).sum(axis=(1, 2))
    return logprobs[::2] - logprobs[1::2]


def pair_losses(h: mx.array, kind: str, beta: float) -> mx.array:
    """Return the loss of each pair."""
    match kind:
        case "sigmoid":
            return mx.logaddexp(0, -beta * h)
        case "hinge":
            return nn.relu(1 - beta * h)
    return (h - 1 / (2 * beta)).square()
