"""Options of a conversion, validated once; the command line and Python build the same object."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from openelm_mlx.dtypes import FLOATS
from openelm_mlx.errors import OptionError
from openelm_mlx.fields import check_fields, explained, in_utf8, option
from openelm_mlx.quantization import (
    ALL_GROUP_SIZES,
    BITS,
    MLX_GROUP_SIZE,
    MODES,
    QuantSpec,
    make_spec,
)

# called with the steps done, the steps in all, and what was done last: a tensor's name or a phrase
Progress = Callable[[int, int, str], None]
SOURCE_FORMATS = ("pt", "huggingface", "mlx", "corenet-mlx", "gguf")
TARGET_FORMATS = ("mlx", "hf", "gguf")
GGUF_SUFFIX = ".gguf"
FOUR_BITS = ("Q4_K_M", "Q4_K_S", "Q4_0", "IQ4_NL", "IQ4_XS")
THREE_BITS = ("Q3_K_L", "Q3_K_M", "Q3_K_S")
GGUF_TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q5_K_S", "Q5_0", *FOUR_BITS, *THREE_BITS, "Q2_K")
ADAPTER = ("merge", "keep")
CALIBRATIONS = ("gptq", "distill", "best")


@explained()
@dataclass(frozen=True)
class ConvertOptions:
    """The options of a conversion. Raises `OptionError` for the first field that is not allowed."""

    source: Path = field(metadata={"help": "a CoreNet .pt file, a model folder or a GGUF file"})
    target: Path = field(metadata={"help": "the model folder, or GGUF file, to write"})
    source_format: str | None = option(
        None, "what the source is; unset detects it", flag="--from", choices=SOURCE_FORMATS
    )
    target_format: str | None = option(
        None,
        "what to write; unset is gguf for a PATH that ends in .gguf, else mlx",
        flag="--to",
        choices=TARGET_FORMATS,
    )
    dtype: str | None = option(
        None, "type of the weights; unset keeps what there is, quantized or not", choices=FLOATS
    )
    head_dim: int | None = option(None, "size of a head, if no tensor shows it", 2, 65536)
    rope_base: float | None = option(
        None, "base of the rotary embeddings; unset is 10000", 1.0, 1e12
    )
    config: Path | None = option(None, "CoreNet YAML or config.json of the source")
    tokenizer: Path | None = option(None, "tokenizer.model; by default the one beside the source")
    adapter: str | None = option(
        None,
        "merge a LoRA or DoRA adapter (the default), or keep it in the folder `adapter`",
        choices=ADAPTER,
    )
    adapter_folder: Path | None = option(
        None,
        "an adapter of mlx-lm's or PEFT's form, which belongs to the source",
        metavar="FOLDER",
    )
    lora_alpha: float | None = option(None, "strength of an adapter that has no YAML", 0.0, 1e6)
    rank_stabilised: bool | None = option(
        None, "with --lora-alpha: divide it by the root of the rank (rsLoRA)"
    )
    bits: int | None = option(None, "quantize to this many bits", choices=BITS)
    group_size: int | None = option(
        None, f"weights that share a scale; unset is {MLX_GROUP_SIZE}", choices=ALL_GROUP_SIZES
    )
    mode: str | None = option(
        None, "affine, or a block format with bits and groups of its own", choices=tuple(MODES)
    )
    gguf_type: str | None = option(
        None,
        "quantize a GGUF file to this type or mixture of llama.cpp's; --bits 8 is Q8_0",
        choices=GGUF_TYPES,
    )
    recipe: str | None = option(
        None, "bits by role: a built-in recipe's name, or a YAML file", metavar="NAME|FILE"
    )
    target_bpw: float | None = option(
        None,
        "measure every matrix in every spec, and choose the best of this many bits per weight",
        2.0,
        16.0,
    )
    calibrate: str | None = option(
        None,
        "learn the rounding: gptq (error feedback, minutes), distill (by gradient, longer), or "
        "best (both, and the better one on text that neither learned from)",
        choices=CALIBRATIONS,
    )
    calibration_text: Path | None = option(
        None, "text to measure and learn on; unset is what the model itself writes"
    )
    calibration_tokens: int = option(
        32768, "tokens that --calibrate learns on; measuring takes 2048", 257, 1 << 24
    )
    verify_text: Path | None = option(None, "text to verify on; implies --verify")
    max_kl: float | None = option(
        None,
        "fail, and write nothing, above this mean KL divergence in nats; implies --verify",
        0.0,
        math.inf,
    )
    dry_run: bool = option(False, "show plan, sizes, memory and time needed; write nothing")
    force: bool = option(
        False, "replace what an earlier conversion wrote, if nobody has changed it since"
    )
    measure: bool = option(
        True,
        "measure the largest activation where norms are float32, so that a GPU may compute in "
        "float16",
    )
    verify: bool = option(False, "compare the result with the source in float32")
    instruct: bool | None = option(
        None, "add the chat template; unset goes by 'instruct' in the source's name"
    )

    source_name: str | None = None
    """The source's name if its path says nothing: a hub id, or a name of the catalog."""

    def __post_init__(self) -> None:
        check_fields(self)
        check_quantization(self)
        if not self.is_gguf and self.names_gguf:
            raise OptionError(
                f"--to {self.target_format} writes a folder, but --output {self.target} is the "
                "name of a GGUF file; leave out --to, or choose another name"
            )
        if self.format == "hf" and self.quantizes:
            raise OptionError(
                "--to hf writes unquantized weights; leave out --bits and --mode, or --to hf"
            )
        if self.is_gguf and self.adapter == "keep":
            raise OptionError("--to gguf writes one file of weights; leave out --adapter keep")
        if self.is_gguf and (self.recipe or self.target_bpw or self.calibrate):
            raise OptionError(
                "--to gguf quantizes by --gguf-type; leave out --recipe, --target-bpw and "
                "--calibrate"
            )
        if self.is_gguf and self.dtype is not None and (self.spec or self.gguf_type):
            raise OptionError(
                f"--dtype {self.dtype} is the type of a GGUF file that is not quantized; leave out "
                "--dtype, or what quantizes (--gguf-type, --bits)"
            )
        if self.gguf_type is not None and not self.is_gguf:
            raise OptionError(
                f"--gguf-type {self.gguf_type} is a type of GGUF files; leave it out, or give "
                "--to gguf"
            )

    @property
    def format(self) -> str:
        """The format to write: the one asked for, or else the one that the target's name says."""
        return self.target_format or ("gguf" if self.names_gguf else "mlx")

    @property
    def names_gguf(self) -> bool:
        return self.target.name.lower().endswith(GGUF_SUFFIX)

    @property
    def is_gguf(self) -> bool:
        return self.format == "gguf"

    @property
    def shown_source(self) -> str:
        """The source without paths of the machine, in UTF-8 as the record of a conversion is."""
        return in_utf8(self.source_name or self.source.absolute().name)

    @property
    def inputs(self) -> list[Path]:
        """The files and folders that the options name as to be read."""
        recipe = None if self.recipe is None else Path(os.path.expanduser(self.recipe))
        named = (self.source, self.config, self.tokenizer, self.adapter_folder, self.verify_text)
        found = (*named, self.calibration_text, recipe)
        return [path for path in found if path is not None and os.path.exists(path)]

    @property
    def spec(self) -> QuantSpec | None:
        """The one spec of every matrix, None if the flags ask for no quantization."""
        return make_spec(self.bits, self.group_size, self.mode)

    @property
    def quantizes(self) -> bool:
        """True if any flag asks for quantization: uniform, by role or measured."""
        return self.spec is not None or self.recipe is not None or self.target_bpw is not None

    @property
    def uses_text(self) -> bool:
        """True if something is measured or learned on calibration text."""
        return self.target_bpw is not None or self.calibrate is not None

    @property
    def verifies(self) -> bool:
        return self.verify or self.verify_text is not None or self.max_kl is not None

    @property
    def keeps_plan(self) -> bool:
        """True if matrices that are quantized in the source stay as they are."""
        return self.format == "mlx" and self.dtype is None

    @property
    def is_instruct(self) -> bool:
        """True if the model chats: as asked for, or else by the word in the names of the source and
        its folder.
        """
        if self.instruct is not None:
            return self.instruct
        source = self.source.absolute()
        return any(
            "instruct" in name.lower()
            for name in (source.name, source.parent.name, self.target.name)
        )


def check_quantization(options: ConvertOptions) -> None:
    """Raise `OptionError` for two ways to choose a plan at once, or for calibration of nothing."""
    if options.group_size is not None and options.bits is None and options.mode is None:
        chosen = (("--recipe", options.recipe), ("--target-bpw", options.target_bpw))
        for flag, value in (*chosen, ("--gguf-type", options.gguf_type)):
            if value is not None:
                raise OptionError(f"{flag} chooses the groups by itself; leave out --group-size")
    flags = {
        "--bits or --mode": options.spec,
        "--recipe": options.recipe,
        "--target-bpw": options.target_bpw,
    }
    given = [flag for flag, value in flags.items() if value is not None]
    if options.gguf_type is not None:
        given.append("--gguf-type")
    if len(given) > 1:
        raise OptionError(f"{' and '.join(given)} each choose the plan; give one of them")
    if options.calibrate is not None and not given and not options.is_gguf:
        raise OptionError(
            f"--calibrate {options.calibrate} needs something to round; give {', '.join(flags)} too"
        )
    if options.calibration_text is not None and not options.uses_text:
        raise OptionError(
            "--calibration-text is used by --target-bpw and --calibrate; give one of them too"
        )
    default = ConvertOptions.calibration_tokens
    if options.calibration_tokens != default and options.calibrate is None:
        raise OptionError("--calibration-tokens is used by --calibrate; give that too")
    if options.rank_stabilised is not None and options.lora_alpha is None:
        raise OptionError("--rank-stabilised is used by --lora-alpha; give that too")
