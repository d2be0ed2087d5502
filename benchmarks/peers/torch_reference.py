"""OpenELM in PyTorch, written to be read: a second opinion on tokens, and a peer on speed.

The weights are those of a model folder, read with the safetensors package. Quantized ones (affine)
are expanded here, with arithmetic of its own, so this peer computes the same numbers and reads more
bytes. The architecture is that of arXiv:2404.14619 and of
corenet/modeling/models/language_modeling/general_gpt.py.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from openelm_mlx.benchmarks.peers import Timed
from openelm_mlx.dtypes import DTYPES, name_of
from openelm_mlx.errors import BenchmarkError
from openelm_mlx.files import read_json, weight_files
from openelm_mlx.model.config import OpenELMConfig, layer_shapes
from openelm_mlx.quantization import quantization_of, spec_of

Weights = dict[str, torch.Tensor]
Cache = list[tuple[torch.Tensor, torch.Tensor]]


class ReferenceOpenELM:
    """The decoder as a function of tokens and cache. Weights have the names of the checkpoint."""

    def __init__(self, config: OpenELMConfig, weights: Weights) -> None:
        self.config, self.shapes, self.w = config, layer_shapes(config), weights
        self.embedding = weights["transformer.token_embeddings.weight"]
        tied = config.share_input_output_layers
        self.head = self.embedding if tied else weights["lm_head.weight"]
        half = config.head_dim // 2
        steps = torch.arange(half, device=self.embedding.device)
        self.frequencies = config.rope_freq_constant ** (-steps / half)

    def make_cache(self, capacity: int) -> Cache:
        """Allocate keys and values of each layer, [1, kv_heads, capacity, head_dim]."""
        sizes = [(1, shape.kv_heads, capacity, self.config.head_dim) for shape in self.shapes]
        return [(self.embedding.new_empty(size), self.embedding.new_empty(size)) for size in sizes]

    def __call__(self, tokens: torch.Tensor, cache: Cache, start: int) -> torch.Tensor:
        """Return the logits [vocab] after the last of `tokens` [L], which follow position `start`.

        The cache has the keys and values of all positions before.
        """
        length, device = len(tokens), tokens.device
        positions = torch.arange(start, start + length, device=device)
        angles = positions[:, None] * self.frequencies  # [L, half]
        turn = torch.cos(angles), torch.sin(angles)
        mask = None
        if length > 1:
            mask = torch.ones(length, start + length, dtype=torch.bool, device=device).tril(start)
        x = F.embedding(tokens, self.embedding)[None]  # [1, L, dim]
        for number, kept in enumerate(cache):
            layer = f"transformer.layers.{number}."
            normed = self.norm(x, layer + "attn_norm")
            x = x + self.attention(number, layer + "attn.", normed, turn, mask, kept, start)
            x = x + self.feed_forward(layer + "ffn.", self.norm(x, layer + "ffn_norm"))
        return F.linear(self.norm(x[:, -1], "transformer.norm"), self.head)[0]

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self.w[name + ".weight"].float()
        return F.rms_norm(x.float(), weight.shape, weight, self.config.rms_norm_eps).to(x.dtype)

    def attention(
        self, number: int, at: str, x: torch.Tensor, turn: Any, mask: Any, kept: Any, start: int
    ) -> torch.Tensor:
        shape, length, size = self.shapes[number], x.shape[1], self.config.head_dim
        q_heads, kv_heads = shape.q_heads, shape.kv_heads
        heads = F.linear(x, self.w[at + "qkv_proj.weight"]).view(1, length, -1, size)
        heads = heads.transpose(1, 2)  # [1, heads, L, head_dim]
        q, k, v = heads.split((q_heads, kv_heads, kv_heads), dim=1)
        if self.config.normalize_qk_projections:
            q, k = self.norm(q, at + "q_norm"), self.norm(k, at + "k_norm")
        keys, values = (array[:, :, : start + length] for array in kept)
        keys[:, :, start:], values[:, :, start:] = rotate(k, *turn), v
        out = F.scaled_dot_product_attention(
            rotate(q, *turn), keys, values, attn_mask=mask, enable_gqa=q_heads != kv_heads
        )
        return F.linear(out.transpose(1, 2).reshape(1, length, -1), self.w[at + "out_proj.weight"])

    def feed_forward(self, at: str, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(x, self.w[at + "proj_1.weight"])
        if self.config.ffn_with_glu:
            gate, up = x.chunk(2, dim=-1)
            x = F.silu(gate) * up
        else:
            x = F.silu(x)
        return F.linear(x, self.w[at + "proj_2.weight"])


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [1, heads, L, head_dim] in float32; its halves are the pairs (arXiv:2104.09864)."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def read_folder(folder: Path, dtype: torch.dtype, device: str) -> tuple[OpenELMConfig, Weights]:
    """Return the configuration and unquantized weights of a folder.

    Raises `BenchmarkError` for block formats.
    """
    raw = read_json(folder / "config.json")
    stored: Weights = {}
    for path in weight_files(folder):
        stored.update(load_file(path))
    quantization = quantization_of(raw) or {}
    weights: Weights = {}
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        if kind in ("scales", "biases"):
            continue
        if f"{module}.scales" in stored:
            spec = spec_of(quantization, module)
            if spec is None or spec.mode != "affine":
                what = f"{module} is quantized as {spec}"
                raise BenchmarkError(f"{what}; the PyTorch reference reads affine only")
            scales, biases = stored[f"{module}.scales"], stored[f"{module}.biases"]
            tensor = dequantize(tensor, scales, biases, spec.bits)
        # without a copy it would stay in the file until it is used
        weights[name] = tensor.to(device=device, dtype=dtype, copy=True)
    return OpenELMConfig.from_hf_dict(raw), weights


def dequantize(
    packed: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, bits: int
) -> torch.Tensor:
    """Turn MLX's affine form into numbers [rows, columns], float32.

    `packed` is [rows, words] uint32, `scales` and `biases` are [rows, groups]. A row is one stream
    of bits, lowest first: column i takes bits i * bits ... (i + 1) * bits - 1; its value is scale *
    integer + bias of its group.
    """
    octets = F.pad(packed.contiguous().view(torch.uint8), (0, 1)).int()  # [rows, 4 * words + 1]
    at = torch.arange(packed.shape[1] * 32 // bits) * bits  # where a column begins
    pairs = octets[:, at // 8] | octets[:, at // 8 + 1] << 8  # it spans two octets at most
    integers = pairs >> (at % 8).int() & 2**bits - 1  # [rows, columns]
    groups = integers.reshape(*scales.shape, -1).float()
    return (groups * scales.float()[..., None] + biases.float()[..., None]).reshape(len(packed), -1)


class TorchReference:
    """The decoder on Apple's GPU if there is one, else on the CPU."""

    engine = "torch"

    def __init__(self, model: ReferenceOpenELM, load_seconds: float, expanded: bool) -> None:
        self.model, self.load_seconds = model, load_seconds
        self.device = model.embedding.device.type
        self.version = f"{torch.__version__} on {self.device}"
        kind = name_of(model.embedding.dtype)
        note = f"the PyTorch reference expands quantized weights to {kind}"
        self.notes: tuple[str, ...] = (note,) if expanded else ()

    @torch.inference_mode()
    def generate(self, prompt: list[int], tokens: int) -> Timed:
        """Run the prompt in one pass, then token by token; `item` waits for the device."""
        found: list[int] = []
        seconds: list[float] = []
        start = perf_counter()
        cache = self.model.make_cache(len(prompt) + tokens)
        given, position = torch.tensor(prompt, device=self.device), 0
        for _ in range(tokens):
            new = self.model(given, cache, position).argmax(-1, keepdim=True)
            given, position = new, position + len(given)
            found.append(int(new.item()))
            seconds.append(perf_counter() - start)
        memory = torch.mps.driver_allocated_memory() if self.device == "mps" else None
        return Timed(tuple(found), tuple(seconds), memory)

    def close(self) -> None:
        del self.model
        if self.device == "mps":
            torch.mps.empty_cache()


def open_session(folder: Path, dtype: str) -> TorchReference:
    device = "mps" if torch.backends.mps.is_available() else "cpu"
    start = perf_counter()
    config, weights = read_folder(folder, DTYPES[dtype].torch, device)
    if device == "mps":
        torch.mps.synchronize()
    seconds = perf_counter() - start
    expanded = quantization_of(read_json(folder / "config.json")) is not None
    return TorchReference(ReferenceOpenELM(config, weights), seconds, expanded)
