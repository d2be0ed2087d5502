"""A name becomes an `Engine`: model, tokenizer and configuration, each checked."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm_mlx import device
from openelm_mlx.device import mx, nn
from openelm_mlx.dtypes import DTYPES, FLOATS, itemsize, name_of
from openelm_mlx.engine.adapter_files import read_adapter
from openelm_mlx.engine.compute_type import compute_dtype, largest_activation
from openelm_mlx.engine.decode import Steps
from openelm_mlx.engine.hub import Resolved, resolve_model
from openelm_mlx.engine.memory import check_memory
from openelm_mlx.engine.options import ModelOptions, SamplingOptions
from openelm_mlx.engine.prompts import TEMPLATE
from openelm_mlx.engine.threads import asynchronous, device_work
from openelm_mlx.engine.tokenizer import Tokenizer, check_vocabulary
from openelm_mlx.errors import CheckpointError, ConfigError, OptionError, naming
from openelm_mlx.fields import shown
from openelm_mlx.files import read_json
from openelm_mlx.model.adapters import Adapter, adapted, prepare
from openelm_mlx.model.checkpoint import (
    Headers,
    check_flags,
    odd_flags,
    read_headers,
    read_weights,
)
from openelm_mlx.model.config import GENERATION_CONFIG, GENERATION_KEYS, OpenELMConfig
from openelm_mlx.model.decoder import OpenELM, parameters
from openelm_mlx.model.fingerprint import fingerprint_of, same_base
from openelm_mlx.quantization import MLX_GROUP_SIZE, QuantSpec

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from openelm_mlx.engine.options import GenerationOptions
    from openelm_mlx.engine.prompts import Prompt
    from openelm_mlx.engine.request import Event

PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")
SAMPLING_KEYS = ("temperature", "top_k", "top_p", "min_p", *PENALTIES)
# those of the examples in Apple's model cards
APPLES_DEFAULTS: Mapping[str, Any] = {"do_sample": False, "repetition_penalty": 1.2}


@dataclass(repr=False)
class Engine:
    """A loaded model, ready to generate, from any thread and for several at once.

    It may have several adapters, each an engine of its own that shares these weights; a request
    chooses one by name, as in `generate(engine, text, adapter="story")`.

    Only a thread of yours that runs `engine.model` itself needs care: it should call
    `mx.clear_streams()` before it ends, or MLX may crash when the process exits.
    """

    model: OpenELM
    tokenizer: Tokenizer
    config: OpenELMConfig
    name: str
    path: Path
    quantization: Mapping[str, Any] | None = None  # as in config.json, with false for the others
    instruct: bool = False
    chat_sampling: SamplingOptions = SamplingOptions(
        repetition_penalty=APPLES_DEFAULTS["repetition_penalty"]
    )
    adapter: Adapter | None = None  # what `model` applies
    adapters: dict[str, Engine] = field(default_factory=dict)  # by name
    steps: Steps = field(init=False)

    def __post_init__(self) -> None:
        self.steps = Steps(self.model)

    @device_work
    def load_adapter(self, adapter: str | Path | Adapter, name: str | None = None) -> Engine:
        """Load an adapter, and return an engine that applies it; it is added to `adapters`, too.

        >>> engine.load_adapter("story-adapter", "story")
        >>> text = generate(engine, "Once upon a time", adapter="story")

        It is LoRA or DoRA in a folder of mlx-lm's or PEFT's form, or in CoreNet's checkpoint, and
        applied beside the weights, which the engines share as they are now. `name` is by default
        the folder's. Raises `OptionError` for a name that is taken, and `CheckpointError`,
        `ConfigError` or `ConversionError` for an adapter that is damaged or of another model.
        """
        if self.adapter is not None:
            what = f"{self.name} applies an adapter; load another one into the engine without it"
            raise OptionError(what)
        if not isinstance(adapter, (str, Path, Adapter)):
            raise OptionError(f"adapter is {shown(adapter)}; allowed is the folder of one")
        chosen = adapter
        if not isinstance(chosen, Adapter):
            chosen = read_adapter(Path(chosen).expanduser(), self.config)
        if chosen.base is not None and not same_base(chosen.base, fingerprint_of(self.model)):
            what = f"the adapter {chosen.name} was made for other weights than {self.name}'s"
            raise CheckpointError(f"{what}; give the model that it was made for")
        name = chosen.name if name is None else name
        if not isinstance(name, str) or not name:
            raise OptionError(f"the name of an adapter is {shown(name)}; allowed is a text")
        if name in self.adapters:
            remedy = "give another name, or first remove it from engine.adapters"
            raise OptionError(f"{self.name} has an adapter {name!r} already; {remedy}")
        model = adapted(self.model, chosen)
        prepare(model)
        own: Any = {"name": f"{self.name} with {name}", "adapter": chosen, "adapters": {}}
        own["instruct"] = self.instruct or chosen.instruct
        self.adapters[name] = replace(self, model=model, **own)
        return self.adapters[name]

    def adapted(self, name: str | None) -> Engine:
        """Return the engine that applies the adapter `name`, or this one for None.

        Raises `OptionError` if no such adapter was loaded.
        """
        if name is None:
            return self
        if name not in self.adapters:
            known = ", ".join(map(repr, self.adapters)) or "none; load it with load_adapter"
            raise OptionError(f"{self.name} has no adapter {name!r}; loaded: {known}")
        return self.adapters[name]

    def stream(
        self,
        prompt: Prompt,
        sampling: SamplingOptions | None = None,
        options: GenerationOptions | None = None,
        **settings: Any,
    ) -> AsyncGenerator[Event, None]:
        """Yield one `Event` per token to a coroutine, as `stream_generate` does to others.

        >>> async for event in engine.stream("Once upon a time", max_tokens=64):
        ...     print(event.text, end="", flush=True)

        Several may run at once, a step of each in turn, and the event loop stays free. Errors are
        raised where the first event is awaited. Cancelling the task, or closing the iterator, ends
        the generation after the current step.
        """
        from openelm_mlx.engine.generation import stream_generate

        return asynchronous(partial(stream_generate, self, prompt, sampling, options, **settings))

    def __repr__(self) -> str:
        """Return one line: <Engine openelm-tiny: 6.5 M parameters, 6.9 MB, context 1024>"""
        size = f"{self.num_parameters / 1e6:,.1f} M parameters, {self.nbytes / 1e6:,.1f} MB"
        return f"<Engine {self.name}: {size}, context {self.config.max_context_length}>"

    @property
    def vocab(self) -> int:
        """The number of ids that may be sampled: rows of the embedding beyond are padding."""
        return min(self.config.vocab_size, self.tokenizer.vocab_size)

    @property
    def num_parameters(self) -> int:
        """The number of weights, those of the adapter included."""
        more = 0 if self.adapter is None else self.adapter.num_parameters
        return self.config.num_parameters + more

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all weights, those of the adapter included."""
        arrays = {id(array): array for array in parameters(self.model).values()}
        return sum(array.nbytes for array in arrays.values())  # what two modules share counts once


def load(
    name: str | Path = "openelm-tiny",
    dtype: str | mx.Dtype | None = None,
    bits: int | None = None,
    group_size: int = MLX_GROUP_SIZE,
    tokenizer: str | Path | None = None,
    revision: str | None = None,
    adapter: str | Path | None = None,
) -> Engine:
    """Load a model: a folder, a .gguf or .pt file, a hub id, or a name from `openelm models`.

    A file, or a folder that the engine cannot load as it is, is converted once into a cache.
    `dtype` is the type of the activations, by name or MLX's own. By default it is float32 on the
    CPU backend; elsewhere it is the checkpoint's own, or for a checkpoint in float32 bfloat16, or
    float16 where a conversion has measured that it has the range (`openelm inspect` tells).
    `bits` quantizes a full-precision model while loading, in groups of `group_size` weights.
    `tokenizer` is a file to use in place of the model's own; `revision` is a branch, tag or commit
    on the hub. `adapter` is that of `Engine.load_adapter`, and applied to all requests. Raises
    `HubError`, `ConfigError`, `CheckpointError`, `ConversionError`, `TokenizerError` or
    `OptionError`.
    """
    if isinstance(dtype, mx.Dtype):
        dtype = name_of(dtype)
    if not isinstance(name, (str, Path)):
        allowed = "allowed is a name, or a path to a folder or file"
        raise OptionError(f"the model is {shown(name)}; {allowed}")
    # converts numbers to Python's own types and texts to paths
    given: Any = (dtype, bits, group_size, tokenizer, revision, adapter)
    chosen = ModelOptions(*given)
    resolved = resolve_model(str(name), chosen.revision, chosen.tokenizer)
    return load_resolved(str(name), resolved, chosen)


@device_work
def load_resolved(name: str, resolved: Resolved, options: ModelOptions) -> Engine:
    """Return the engine of a folder in this project's layout. Raises the errors of `load`."""
    folder, bits, group_size = resolved.folder, options.bits, options.group_size
    with naming(folder):
        headers = read_headers(folder)
    config, quantization = headers.config, headers.quantization
    sampling = chat_sampling(folder)
    where = options.adapter
    adapter = None if where is None else read_adapter(where.expanduser(), config)
    if bits is not None and quantization:
        raise OptionError(f"{name} is quantized already; --bits needs full-precision weights")
    check_memory(name, config, loaded_bytes(headers, options), bool(quantization or bits))
    with naming(folder):
        weights = read_weights(headers)
    model, flags = OpenELM(config), odd_flags(weights, headers.specs)
    if headers.specs:
        quantize_as_stored(model, headers.specs)
    stored = name_of(weights["transformer.norm.weight"].dtype)
    largest = largest_activation(folder, headers)
    computed = compute_dtype(config, stored, options.dtype, device.kind(), largest).dtype
    dtype = DTYPES[computed].mlx
    model.load_weights([(key, cast(array, dtype)) for key, array in weights.items()])
    if bits is not None:
        quantize_now(model, bits, group_size)
        quantization = QuantSpec(bits, group_size).as_config()
    model.eval()
    del weights  # else they would stay beside what they become
    with naming(folder):
        read_in(model, flags)
    given = resolved.tokenizer
    tokenizer = Tokenizer.from_file(given) if given else Tokenizer.from_folder(folder)
    check_vocabulary(tokenizer.path, tokenizer.vocab_size, config)
    instruct = speaks_instruct(folder, name)
    engine = Engine(model, tokenizer, config, name, folder, quantization, instruct, sampling)
    return engine if adapter is None else engine.load_adapter(adapter)


def read_in(model: OpenELM, flags: Mapping[str, mx.array]) -> None:
    """Read a model's weights into memory, a layer at a time: few are there in both forms.

    Raises `CheckpointError` if one of `flags`, those of `odd_flags`, is true.
    """
    for number, layer in enumerate(model.layers):
        prefix = f"transformer.layers.{number}."
        own = [flag for name, flag in flags.items() if name.startswith(prefix)]
        mx.eval(layer.parameters(), own)
    mx.eval(model.parameters(), flags)
    check_flags(flags)


def loaded_bytes(headers: Headers, options: ModelOptions) -> int:
    """Return the bytes that the weights of a folder with these headers take once loaded.

    Raises `OptionError` for a type that is not allowed.
    """
    infos = {name: place.info for name, (_, place) in headers.places.items()}
    stored = infos["transformer.norm.weight"].dtype
    computed = compute_dtype(headers.config, stored, options.dtype, device.kind()).dtype
    width = 8 * itemsize(computed)  # bits of a weight
    total = 0
    for info in infos.values():
        if info.dtype not in FLOATS:
            total += info.nbytes
        elif options.bits is not None and len(info.shape) == 2:
            a_group = options.bits * options.group_size + 2 * width  # with scale and bias
            total += math.prod(info.shape) // options.group_size * a_group // 8
        else:
            total += math.prod(info.shape) * width // 8
    return total


def speaks_instruct(folder: Path, name: str) -> bool:
    """Return whether the model was trained on the Instruct format: by its template or its name."""
    if (folder / TEMPLATE).exists() or "instruct" in name.rsplit("/", 1)[-1].lower():
        return True
    settings = folder / "tokenizer_config.json"
    return settings.exists() and "chat_template" in read_json(settings)


def generation_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the file of `folder` that states how to generate, and what it states.

    That is generation_config.json, or what transformers wrote into config.json before version 5.
    Apple's defaults stand where nothing is said of sampling.
    """
    path, raw = folder / GENERATION_CONFIG, {}
    if path.exists():
        raw = read_json(path)
    elif (folder / "config.json").exists():
        path = folder / "config.json"
        raw = {key: value for key, value in read_json(path).items() if key in GENERATION_KEYS}
    silent = all(raw.get(key) is None for key in ("do_sample", *SAMPLING_KEYS))
    return path, {**raw, **APPLES_DEFAULTS} if silent else raw


def chat_sampling(folder: Path) -> SamplingOptions:
    """Return the defaults of a chat with the model in `folder`.

    Keys and meaning are those of Hugging Face's GenerationConfig, with two more keys for the
    penalties on the answer alone. The choice is greedy unless `do_sample` is true, with a
    temperature of 1 by default. Raises `ConfigError` for a damaged file and values out of range.
    """
    path, raw = generation_config(folder)
    sample = raw.get("do_sample")
    if sample is not None and not isinstance(sample, bool):
        raise ConfigError(f"{path}: do_sample is {sample!r}; it must be true or false")
    given = {key: raw[key] for key in SAMPLING_KEYS if raw.get(key) is not None}
    try:
        options = SamplingOptions(**{"temperature": 1.0, **given})
    except OptionError as error:
        raise ConfigError(f"{path}: {error}") from None
    return options if sample else replace(options, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)


def quantize_as_stored(model: OpenELM, specs: Mapping[str, QuantSpec]) -> None:
    """Quantize each layer of `specs`, which fit its shape."""

    def settings(path: str, module: nn.Module) -> bool | dict[str, Any]:
        return specs[path].as_config() if path in specs else False

    nn.quantize(model, class_predicate=settings)


def quantize_now(model: OpenELM, bits: int, group_size: int) -> None:
    """Quantize every layer. Raises `OptionError` if a layer's rows are not whole groups."""
    try:
        nn.quantize(model, group_size=group_size, bits=bits)
    except ValueError as error:
        what = f"cannot quantize to {bits} bits in groups of {group_size}"
        raise OptionError(f"{what}: {error}") from None


def cast(array: mx.array, dtype: mx.Dtype) -> mx.array:
    """Return weights, scales and biases in `dtype`, and packed integers as they are."""
    return array.astype(dtype) if mx.issubdtype(array.dtype, mx.floating) else array
