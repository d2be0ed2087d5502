"""Adapters in mlx-lm's format (adapters.safetensors, adapter_config.json) merged into any source of
weights.

mlx-lm keeps, for a linear layer W [out, in], `lora_a` [in, r] and `lora_b` [r, out], for an
embedding `lora_a` [vocabulary, r] and `lora_b` [r, dim], one `scale` for all, and for DoRA the row
lengths `m` (mlx_lm/tuner). An adapted tied embedding is adapted in the head too, so merging leaves
it tied.
"""

from __future__ import annotations

from pathlib import Path

from openelm_mlx.convert.sources import TensorSource
from openelm_mlx.convert.sources.huggingface import load_place
from openelm_mlx.device import mx
from openelm_mlx.errors import ConversionError
from openelm_mlx.files import TensorPlace, read_header, read_json

ADAPTERS = "adapters.safetensors"
LEAVES = ("lora_a", "lora_b", "m")
EMBEDDING = "transformer.token_embeddings"


class FusedAdapter(TensorSource):
    """`source` with the adapter in `folder` merged into it. Raises `ConversionError` where they do
    not fit.
    """

    def __init__(self, source: TensorSource, folder: Path) -> None:
        self.path, self._source, self._folder = source.path, source, folder
        self.config, self.tokenizer, self.instruct = (
            source.config,
            source.tokenizer,
            source.instruct,
        )
        self.licence = source.licence
        self._scale, self._located = read_adapter(folder)
        self._parts: dict[
            str, dict[str, str]
        ] = {}  # name in the source -> leaf -> name in the adapter
        for name in self._located:
            stem, _, leaf = name.rpartition(".")
            if leaf not in LEAVES or f"{stem}.weight" not in source.tensors:
                raise ConversionError(
                    f"{folder} adapts {name[:100]}, which {source.path} does not have"
                )
            self._parts.setdefault(f"{stem}.weight", {})[leaf] = name
        for name, parts in self._parts.items():
            self._check(name, parts)
        self.tensors = dict(source.tensors)
        self.forms = {
            stem: form for stem, form in source.forms.items() if f"{stem}.weight" not in self._parts
        }

    @property
    def files(self) -> tuple[Path, ...]:
        return (*self._source.files, self._folder / ADAPTERS)

    def packed(self, name: str) -> dict[str, mx.array]:
        return self._source.packed(name)

    def load(self, name: str) -> mx.array:
        """The tensor `name`, merged in float32 and rounded once to the type its base is stored
        in.
        """
        base = self._source.load(name)
        if name not in self._parts:
            return base
        parts = {
            leaf: load_place(self._located[part]).astype(mx.float32)
            for leaf, part in self._parts[name].items()
        }
        a, b = parts["lora_a"], parts["lora_b"]
        first, second = (a, b) if self._is_embedding(name) else (b.T, a.T)
        weight = mx.addmm(base.astype(mx.float32), first, second, alpha=self._scale)
        if "m" in parts:
            weight = weight * (parts["m"] / mx.linalg.norm(weight, axis=1))[:, None]
        return weight.astype(base.dtype)

    def _is_embedding(self, name: str) -> bool:
        return name == f"{EMBEDDING}.weight"

    def _check(self, name: str, parts: dict[str, str]) -> None:
        shape = self._source.tensors[name].shape
        shapes = {leaf: self._located[part].info.shape for leaf, part in parts.items()}
        rank = shapes.get("lora_a", (0, 0))[-1]
        outer = shape if self._is_embedding(name) else shape[::-1]
        wanted = {"lora_a": (outer[0], rank), "lora_b": (rank, outer[-1]), "m": (shape[0],)}
        if (
            len(shape) != 2
            or not {"lora_a", "lora_b"} <= shapes.keys()
            or any(shapes[x] != wanted[x] for x in shapes)
        ):
            raise ConversionError(
                f"{self._folder}: the parts of {name} have shapes {shapes}, which do not fit a base of {shape}"
            )


def read_adapter(folder: Path) -> tuple[float, dict[str, TensorPlace]]:
    """The scale and the places of the tensors of an adapter folder. Raises `ConversionError` or
    `ConfigError`.
    """
    raw = read_json(folder / "adapter_config.json")
    kind, parameters = raw.get("fine_tune_type", "lora"), raw.get("lora_parameters")
    if kind not in ("lora", "dora"):
        raise ConversionError(
            f"{folder}: fine_tune_type is {str(kind)[:40]!r}; lora and dora are merged"
        )
    scale = parameters.get("scale") if isinstance(parameters, dict) else None
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not abs(scale) < 1e9:
        raise ConversionError(
            f"{folder}: adapter_config.json has no number as lora_parameters.scale"
        )
    return float(scale), read_header(folder / ADAPTERS)
