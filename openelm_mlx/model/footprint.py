"""The memory that a pass over a prompt takes on a GPU, and the time between two evaluations.

Everything but `layers_at_once` follows from shapes and facts of the chip. None of it was measured
on Metal; where a figure is an assumption it says so.
"""

from __future__ import annotations

import os
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from openelm_mlx import device
from openelm_mlx.device import utils
from openelm_mlx.model.config import OpenELMConfig, layer_shapes
from openelm_mlx.settings import Limits, chip_name, command_limits, gpu_flops

if TYPE_CHECKING:
    from openelm_mlx.model.decoder import OpenELM

# macOS ends a command buffer that keeps the display waiting (jundot/omlx issue 1387); a piece of
# work of this length delays a few frames
LONGEST_SECONDS = 0.05
KERNELS = 13  # that a layer of a quantized model launches at most (docs/performance.md)
SHORT = 16  # tokens: by the arithmetic below fewer take less than 0.1 s through the 3B on an M1


def activations(config: OpenELMConfig) -> int:
    """Return how many numbers a pass makes for each token, over all layers.

    A layer makes its heads three times (projected, normed, rotated), the attention's output, the
    FFN's width three times (gate, up, their product; twice without a gate), and four times
    `model_dim` (two norms, two sums). On a GPU they are freed when the command buffer that reads
    them has ended, so this is the most that a pass can hold.
    """
    widths = 3 if config.ffn_with_glu else 2
    heads = sum(3 * (s.q_heads + 2 * s.kv_heads) + s.q_heads for s in layer_shapes(config))
    ffn = sum(widths * shape.ffn_dim for shape in layer_shapes(config))
    return heads * config.head_dim + ffn + 4 * config.num_transformer_layers * config.model_dim


@lru_cache(maxsize=64)
def layers_between(
    config: OpenELMConfig, elements: int, tokens: int, flops: float | None, limits: Limits
) -> int | None:
    """Return after how many layers a pass should be evaluated; None if MLX's own limits do.

    `elements` is the number of elements in the arrays of the weights, `flops` what the GPU computes
    in a second. A layer takes two operations for each weight and token; attention is short beside
    them. MLX ends a command buffer at either of its `limits`, in kernels or in elements; only where
    such a buffer lasts longer than `LONGEST_SECONDS` an evaluation shortens it. It cannot be made
    shorter than a layer, but by MLX's own limits.
    """
    if flops is None:
        return None
    layers = config.num_transformer_layers
    seconds = 2 * config.num_parameters / layers * tokens / flops
    touched = (elements + tokens * activations(config)) / layers
    in_buffer = min(layers, limits.elements / touched, limits.operations / KERNELS)
    between = max(1, int(LONGEST_SECONDS / seconds))
    return between if between < in_buffer and in_buffer * seconds > LONGEST_SECONDS else None


def layers_at_once(model: OpenELM, tokens: int) -> int | None:
    """Return `layers_between` for a pass over so many tokens here: None but on Metal."""
    if tokens < SHORT or device.kind() != "metal":
        return None
    weights: Any = utils.tree_flatten(model.parameters())
    elements = sum(array.size for _, array in weights)
    chip = chip_name()
    limits = command_limits(chip, os.environ)
    return layers_between(model.args, elements, tokens, gpu_flops(chip), limits)
