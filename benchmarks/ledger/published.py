"""Decode rates of MLX engines on Macs that others have published, with what a token cost there.

None of them was measured here, and none with this engine. Shapes are those of the models' published
config.json. Kernels and bytes of a token are counted by the ledger's rules on the model classes of
mlx-lm, in the closed form of `kernels` and `bytes_read`; a test traces the classes and counts.
mlxcel's OpenELM is a port of mlx-lm's (src/models/openelm.rs), vllm-mlx runs mlx-lm's own.
"""

from __future__ import annotations

from dataclasses import dataclass

from openelm_mlx.benchmarks.hardware import Chip, bytes_per_token, find_chip
from openelm_mlx.model.config import OpenELMConfig
from openelm_mlx.quantization import MLX_GROUP_SIZE

OPENELM = "openelm-1.1b-instruct"
MLXCEL = "https://github.com/lablup/mlxcel/blob/main/benchmarks"
M1_ULTRA = f"{MLXCEL}/pylm_m1ultra_2026-09-06.csv (mlx-lm 0.31.3)"
M5_MAX = f"{MLXCEL}/pylm_m5max_2026-09-06.csv (mlx-lm 0.31.3)"
M1_ULTRA_MLXCEL = f"{MLXCEL}/metal_m1ultra_2026-09-08.csv (mlxcel 0.7.0-beta.1)"
M4_MAX = "https://github.com/ml-explore/mlx-lm/blob/main/mlx_lm/BENCHMARKS.md"
M3_PRO = "https://github.com/ml-explore/mlx-lm/pull/1569"
M4_PRO = "https://github.com/waybarrios/vllm-mlx/issues/531"


@dataclass(frozen=True)
class Shape:
    """A decoder of the Llama family as mlx-lm builds it, activations in 16 bits."""

    layers: int
    hidden: int
    ffn: int
    q_heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    qk_norm: bool = False
    qkv_bias: bool = False

    def kernels(self, bits: int) -> int:
        """Count the kernels of one token.

        A layer has 17: two norms, seven projections, two rotations, two stores (keys, values),
        attention, the gate and two residuals; two more norm queries and keys, and a bias is a
        kernel of its own beside a quantized product. Once a token: the embedding's row (one lookup,
        or three and one that expands it), the last norm, logits, log-probabilities (two), maximum.
        """
        quantized = bits < 16
        layer = 17 + 2 * self.qk_norm + 3 * (self.qkv_bias and quantized)
        return layer * self.layers + (9 if quantized else 6)

    def bytes_read(self, bits: int, context: int) -> float:
        """Return the bytes of weights, keys and values that one token reads.

        Scales and biases of the groups are included; a head that is not tied has the same size.
        """
        q, kv = self.q_heads * self.head_dim, self.kv_heads * self.head_dim
        layer = self.hidden * (2 * q + 2 * kv + 3 * self.ffn)
        matrices = self.layers * layer + (self.vocab + 1) * self.hidden  # head, embedding's row
        a_weight = bits / 8 + (4 / MLX_GROUP_SIZE if bits < 16 else 0)
        norms = self.layers * (2 * self.hidden + 2 * self.head_dim * self.qk_norm) + self.hidden
        biases = self.layers * (q + 2 * kv) * self.qkv_bias
        return matrices * a_weight + 2 * (norms + biases + 2 * self.layers * kv * context)


SHAPES = {
    "smollm-135m": Shape(30, 576, 1536, 9, 3, 64, 49152),
    "qwen2.5-0.5b": Shape(24, 896, 4864, 14, 2, 64, 151936, qkv_bias=True),
    "qwen3-0.6b": Shape(28, 1024, 3072, 16, 8, 128, 151936, qk_norm=True),
    "llama-3.2-1b": Shape(16, 2048, 8192, 32, 8, 64, 128256),
    "qwen2.5-1.5b": Shape(28, 1536, 8960, 12, 2, 128, 151936, qkv_bias=True),
    "qwen3-1.7b": Shape(28, 2048, 6144, 16, 8, 128, 151936, qk_norm=True),
    "qwen3-4b": Shape(36, 2560, 9728, 32, 8, 128, 151936, qk_norm=True),
    "llama-3.1-8b": Shape(32, 4096, 14336, 32, 8, 128, 128256),
    "qwen3-8b": Shape(36, 4096, 12288, 32, 8, 128, 151936, qk_norm=True),
    "qwen2.5-7b": Shape(28, 3584, 18944, 28, 4, 128, 152064, qkv_bias=True),
}


@dataclass(frozen=True)
class Rate:
    """Tokens a second at `context` tokens (the middle of the measured stretch)."""

    chip_name: str
    model: str
    bits: int
    context: int
    tokens_per_second: float
    source: str

    @property
    def chip(self) -> Chip:
        return find_chip(self.chip_name)

    @property
    def kernels(self) -> int:
        if self.model == OPENELM:  # qkv and gate are one projection each, the gate's half is copied
            return 17 * OpenELMConfig.from_name(OPENELM).num_transformer_layers + 9
        return SHAPES[self.model].kernels(self.bits)

    @property
    def bytes_read(self) -> float:
        if self.model == OPENELM:
            form = {"bits": self.bits, "group_size": MLX_GROUP_SIZE}
            config = OpenELMConfig.from_name(OPENELM)
            return sum(bytes_per_token(config, "bfloat16", form, self.context).values())
        return SHAPES[self.model].bytes_read(self.bits, self.context)


def of(chip: str, context: int, source: str, *rows: tuple[str, int, float]) -> tuple[Rate, ...]:
    return tuple(Rate(chip, model, bits, context, rate, source) for model, bits, rate in rows)


RATES = (
    *of(
        "m1-ultra", 576, M1_ULTRA,
        ("qwen2.5-0.5b", 4, 288.73), ("qwen2.5-0.5b", 16, 251.65), ("qwen3-0.6b", 4, 238.91),
        ("llama-3.2-1b", 4, 399.94), ("llama-3.2-1b", 16, 179.34), ("qwen2.5-1.5b", 4, 219.5),
        ("qwen3-1.7b", 4, 188.63), ("qwen3-4b", 4, 116.23), ("llama-3.1-8b", 4, 105.78),
        ("llama-3.1-8b", 16, 35.48), ("qwen3-8b", 4, 80.72), ("qwen2.5-7b", 4, 106.55),
        ("qwen2.5-7b", 8, 69.3),
    ),
    *of("m1-ultra", 576, M1_ULTRA_MLXCEL, (OPENELM, 4, 278.92)),
    *of(
        "m5-max", 576, M5_MAX,
        ("smollm-135m", 4, 723.57), ("qwen2.5-0.5b", 4, 602.24), ("qwen2.5-0.5b", 16, 391.22),
        ("qwen3-0.6b", 4, 570.53), ("llama-3.2-1b", 4, 537.29), ("qwen2.5-1.5b", 4, 366.07),
        ("qwen3-1.7b", 4, 365.56), ("qwen3-4b", 4, 185.95), ("llama-3.1-8b", 4, 115.82),
        ("llama-3.1-8b", 16, 33.25), ("qwen3-8b", 4, 112.38), ("qwen2.5-7b", 4, 123.67),
        ("qwen2.5-7b", 8, 67.66),
    ),
    *of(
        "m4-max", 2112, M4_MAX,
        ("qwen3-4b", 16, 52.47), ("qwen3-4b", 8, 86.907), ("qwen3-4b", 6, 104.68),
        ("qwen3-4b", 5, 116.39), ("qwen3-4b", 4, 134.52),
    ),
    *of("m3-pro", 2112, M3_PRO, ("qwen3-4b", 4, 44.62)),
    *of("m4-pro", 140, M4_PRO, ("qwen3-0.6b", 8, 284.2)),
)  # fmt: skip
