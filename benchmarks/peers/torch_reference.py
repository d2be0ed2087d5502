"""OpenELM in PyTorch, written to be read: a second opinion on tokens and a peer on speed.

Weights are those of a model folder, read with the safetensors package. Quantized ones (affine, any
width) are expanded to full precision here, with arithmetic of its own, so this peer computes the
same numbers and reads more bytes. Source of the architecture: arXiv:2404.14619;
corenet/modeling/models/language_modeling/general_gpt.py.
"""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from openelm_mlx.benchmarks.measure.timing import Timed
from openelm_mlx.dtypes import DTYPES, name_of
from openelm_mlx.errors import BenchmarkError
from openelm_mlx.files import read_json, weight_files
from openelm_mlx.model.config import OpenELMConfig, layer_shapes
from openelm_mlx.quantization import quantization_of, spec_of

Weights = dict[str, torch.Tensor]
Cache = list[tuple[torch.Tensor, torch.Tensor]]


class ReferenceOpenELM:
    """The decoder as one function of (tokens, cache). Weights carry the names of the checkpoint."""

    def __init__(self, config: OpenELMConfig, weights: Weights) -> None:
        self.config, self.shapes, self.w = config, layer_shapes(config), weights
        self.embedding = weights["transformer.token_embeddings.weight"]
        self.head = (
            self.embedding if config.share_input_output_layers else weights["lm_head.weight"]
        )
        half = config.head_dim // 2
        self.frequencies = config.rope_freq_constant ** (
            -torch.arange(half, device=self.embedding.device) / half
        )

    def make_cache(self, room: int) -> Cache:
        """Keys and values of each layer, [1, kv_heads, room, head_dim], all memory taken at
        once.
        """
        sizes = [(1, shape.kv_heads, room, self.config.head_dim) for shape in self.shapes]
        return [(self.embedding.new_empty(size), self.embedding.new_empty(size)) for size in sizes]

    def __call__(self, tokens: torch.Tensor, cache: Cache, start: int) -> torch.Tensor:
        """Logits [vocab] of the last of `tokens` [length], which stand at `start` and after in the
        text.
        """
        length = tokens.shape[0]
        angles = (
            torch.arange(start, start + length, device=tokens.device)[:, None] * self.frequencies
        )  # [L, half]
        turn = torch.cos(angles), torch.sin(angles)
        mask = None
        if length > 1:
            mask = torch.ones(length, start + length, dtype=torch.bool, device=tokens.device).tril(
                start
            )
        x = F.embedding(tokens, self.embedding)[None]  # [1, L, dim]
        for number in range(len(self.shapes)):
            layer = f"transformer.layers.{number}."
            x = x + self.attention(
                layer + "attn.", self.norm(x, layer + "attn_norm"), turn, mask, cache[number], start
            )
            x = x + self.feed_forward(layer + "ffn.", self.norm(x, layer + "ffn_norm"))
        return F.linear(self.norm(x[:, -1], "transformer.norm"), self.head)[0]

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight = self.w[name + ".weight"]
        return F.rms_norm(x.float(), weight.shape, weight.float(), self.config.rms_norm_eps).to(
            x.dtype
        )

    def attention(
        self, at: str, x: torch.Tensor, turn: Any, mask: Any, kept: Any, start: int
    ) -> torch.Tensor:
        (q_heads, kv_heads, _), length = self.shapes[int(at.split(".")[2])], x.shape[1]
        heads = (
            F.linear(x, self.w[at + "qkv_proj.weight"])
            .view(1, length, -1, self.config.head_dim)
            .transpose(1, 2)
        )
        q, k, v = heads.split((q_heads, kv_heads, kv_heads), dim=1)  # [1, heads, L, head_dim]
        if self.config.normalize_qk_projections:
            q, k = self.norm(q, at + "q_norm"), self.norm(k, at + "k_norm")
        q, k = rotate(q, *turn), rotate(k, *turn)
        keys, values = kept
        keys[:, :, start : start + length], values[:, :, start : start + length] = k, v
        keys, values = keys[:, :, : start + length], values[:, :, : start + length]
        out = F.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, enable_gqa=q_heads != kv_heads
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
    """Rotary embedding (arXiv:2104.09864) of x [1, heads, L, head_dim]: its halves are the pairs.
    In float32.
    """
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def read_folder(folder: Path, dtype: torch.dtype, device: str) -> tuple[OpenELMConfig, Weights]:
    """Configuration and full-precision weights of a model folder. Raises `BenchmarkError` for block
    formats.
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
                what = f"{module} is quantized as {spec}; the PyTorch reference reads affine only"
                raise BenchmarkError(what)
            tensor = dequantize(
                tensor, stored[f"{module}.scales"], stored[f"{module}.biases"], spec.bits
            )
        weights[name] = tensor.to(
            device=device, dtype=dtype, copy=True
        )  # or it would stay in the file until it is used
    return OpenELMConfig.from_hf_dict(raw), weights


def dequantize(
    packed: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, bits: int
) -> torch.Tensor:
    """MLX's affine form back to numbers: [rows, words] uint32 and [rows, groups] twice -> [rows, columns] float32.

    A row is one stream of bits, lowest first: column i takes bits i * bits ... (i + 1) * bits - 1;
    its value is scale * integer + bias of its group.
    """
    octets = F.pad(packed.contiguous().view(torch.uint8), (0, 1)).int()  # [rows, 4 * words + 1]
    at = (
        torch.arange(packed.shape[1] * 32 // bits) * bits
    )  # where each column's bits begin; they span two octets at most
    pairs = octets[:, at // 8] | octets[:, at // 8 + 1] << 8
    integers = pairs >> (at % 8).int() & 2**bits - 1  # [rows, columns]
    groups = integers.reshape(*scales.shape, -1).float()
    return (groups * scales.float()[..., None] + biases.float()[..., None]).reshape(
        packed.shape[0], -1
    )


class TorchReference:
    engine = "torch"

    def __init__(
        self, model: ReferenceOpenELM, load_seconds: float, expanded: bool = False
    ) -> None:
        self.model, self.load_seconds = model, load_seconds
        self.device = model.embedding.device.type
        self.version = f"{torch.__version__} on {self.device}"
        kind = name_of(model.embedding.dtype)
        self.notes = (
            (f"the PyTorch reference expands quantized weights to {kind}",) if expanded else ()
        )

    @torch.inference_mode()
    def generate(self, prompt: list[int], tokens: int) -> Timed:
        """The prompt in one pass, then token by token; `item` waits for the device, so each time is
        the host's.
        """
        found: list[int] = []
        seconds: list[float] = []
        start = perf_counter()
        cache = self.model.make_cache(len(prompt) + tokens)
        fed = torch.tensor(prompt, device=self.device)
        for number in range(tokens):
            held = 0 if number == 0 else len(prompt) + number - 1
            fed = self.model(fed, cache, held).argmax(-1, keepdim=True)
            found.append(int(fed.item()))
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
    quantized = quantization_of(read_json(folder / "config.json")) is not None
    return TorchReference(ReferenceOpenELM(config, weights), seconds, quantized)
