"""OpenELM and its adapters in float64, by NumPy alone, written from the papers' formulas.

OpenELM (arXiv:2404.14619)      LoRA (arXiv:2106.09685)     DoRA (arXiv:2402.09353)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from float64 import Array, Var, log_softmax, sigmoid, var

from openelm_mlx.model.config import EMBEDDINGS, HEAD, OpenELMConfig, layer_shapes


class Reference:
    """The model; `weights` are those of a checkpoint, and `parts` those of an adapter by stem.

    A part has `a`, `b`, `scale` and, with DoRA, `m`. Each is a `Var`, of which gradients are asked.
    """

    def __init__(
        self,
        config: OpenELMConfig,
        weights: Mapping[str, Var],
        parts: Mapping[str, Mapping[str, Var]] | None = None,
    ) -> None:
        self.config, self.weights, self.parts = config, weights, parts or {}

    def matrix(self, stem: str, base: str = "") -> Var:
        """Return an adapted matrix. The length of a row is a constant (DoRA, section 4.3)."""
        weight = self.weights[f"{base or stem}.weight"]
        if stem not in self.parts:
            return weight
        part = self.parts[stem]
        changed = weight + part["scale"] * (part["b"] @ part["a"])
        if "m" not in part:
            return changed
        lengths = np.sqrt((changed.value**2).sum(1))
        return (part["m"] * (1 / lengths)).reshape(-1, 1) * changed

    def norm(self, x: Var, name: str) -> Var:
        mean = (x**2.0).sum(-1) * (1 / x.value.shape[-1])
        return x * (mean + self.config.rms_norm_eps) ** -0.5 * self.weights[f"{name}.weight"]

    def logits(self, tokens: Sequence[int]) -> Var:
        """Return the logits [length, vocabulary] of one sequence."""
        x = self.matrix(EMBEDDINGS)[np.array(tokens)]
        for number, (q_heads, kv_heads, _) in enumerate(layer_shapes(self.config)):
            layer = f"transformer.layers.{number}"
            x = x + self.attention(self.norm(x, f"{layer}.attn_norm"), layer, q_heads, kv_heads)
            inner = self.norm(x, f"{layer}.ffn_norm") @ self.matrix(f"{layer}.ffn.proj_1").T
            if self.config.ffn_with_glu:
                half = inner.value.shape[-1] // 2
                gate, up = inner[:, :half], inner[:, half:]
            else:
                gate, up = inner, var(1.0)
            x = x + (gate * sigmoid(gate) * up) @ self.matrix(f"{layer}.ffn.proj_2").T
        # an adapter of a tied model's input side is none of its head
        tied = self.config.share_input_output_layers
        weight = self.matrix(HEAD, EMBEDDINGS if tied else HEAD)
        return self.norm(x, "transformer.norm") @ weight.T

    def attention(self, x: Var, layer: str, q_heads: int, kv_heads: int) -> Var:
        length, size = len(x.value), self.config.head_dim
        heads = (x @ self.matrix(f"{layer}.attn.qkv_proj").T).reshape(length, -1, size)
        heads = heads.swapaxes(0, 1)  # [q + 2 kv, length, size]
        q, k, v = heads[:q_heads], heads[q_heads : q_heads + kv_heads], heads[q_heads + kv_heads :]
        if self.config.normalize_qk_projections:
            q, k = self.norm(q, f"{layer}.attn.q_norm"), self.norm(k, f"{layer}.attn.k_norm")
        cosine, sine, turn = rotation(length, size, self.config.rope_freq_constant)
        q, k = (one * cosine + (one @ turn) * sine for one in (q, k))
        group = np.arange(q_heads) // (q_heads // kv_heads)
        scores = (q @ k[group].T) * size**-0.5
        hidden = np.triu(np.full((length, length), -1e30), 1)
        out = log_softmax(scores + hidden).exp() @ v[group]
        out = out.swapaxes(0, 1).reshape(length, -1)
        return out @ self.matrix(f"{layer}.attn.out_proj").T

    def losses(self, tokens: Sequence[int], z_loss: float = 0.0) -> Var:
        """Return the negative log-likelihood of each token but the first, and `z_loss` times the
        squared log of the softmax's sum (PaLM, arXiv:2204.02311, section 5).
        """
        places, targets = np.arange(len(tokens) - 1), np.array(tokens[1:])
        logits = self.logits(tokens)
        likelihoods = log_softmax(logits)[places, targets]
        total = logits[places, targets] - likelihoods
        return likelihoods * -1.0 + total**2.0 * z_loss


def rotation(length: int, size: int, base: float) -> tuple[Array, Array, Array]:
    """Return the cosines and sines of rotary embeddings (arXiv:2104.09864), and the matrix that
    takes (a, b), the halves of a head, to (-b, a).
    """
    angles = np.arange(length)[:, None] * base ** (-np.arange(0, size, 2) / size)
    angles = np.concatenate([angles, angles], -1)
    half = np.eye(size // 2)
    return np.cos(angles), np.sin(angles), np.block([[0 * half, half], [-half, 0 * half]])
