"""`openelm compare`: what a quantized or changed model has lost of its original."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

from openelm_mlx.cli.evaluate import Progress
from openelm_mlx.cli.options import add_flags, add_model_flags, from_args, load_beside, load_model
from openelm_mlx.cli.perplexity import add_text_flag, named, read_texts, show
from openelm_mlx.engine.options import ModelOptions
from openelm_mlx.evaluate.options import TextOptions

DESCRIPTION = """Compare a model, say a quantized one, with its original: KL divergence, agreement
of the likeliest token, both perplexities and their ratio, with 95 % intervals. Both are in memory
at once, and compute in float32 unless --dtype says otherwise, as for convert --verify: narrower
types round more than 8 bits lose. (`openelm evaluate --against` compares two models' answers to
questions, and `openelm benchmark --compare` two files of measured speed.)"""

EXAMPLES = """examples:
  openelm compare my-model model.gguf
  openelm compare 270m my-model --text long.txt --json
  openelm compare my-model my-model --bits 4         what 4 bits would cost
  openelm compare my-model my-model --adapter my-adapter   how far an adapter leads

--dtype and --tokenizer are for both models; --bits, --adapter and --revision for MODEL.
"""


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "compare",
        help="how far a model is from its original, on a text",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    text = "the original: a name from `openelm models`, a folder or a file"
    parser.add_argument("reference", metavar="ORIGINAL", help=text)
    text = "the model that is compared with it, the same way"
    parser.add_argument("model", metavar="MODEL", help=text)
    add_text_flag(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_flags(parser, TextOptions, skip=("stride",))
    add_model_flags(parser)
    parser.set_defaults(run=run, dtype="float32")


def run(args: argparse.Namespace) -> int:
    options, texts = from_args(TextOptions, args), read_texts(args.text)
    from openelm_mlx.engine.hub import resolve_model

    asked = from_args(ModelOptions, args)  # MODEL is found before the first one is loaded
    resolve_model(args.model, asked.revision, asked.tokenizer)
    reference, model = load_beside(args.reference, args), load_model(args.model, args)
    from openelm_mlx.dtypes import name_of
    from openelm_mlx.evaluate.compare import compare_engines
    from openelm_mlx.evaluate.perplexity import window

    context, _ = window(options, reference, model)
    progress, read = Progress(model.name, False, "the text", "windows"), list(texts.values())
    try:
        with progress:
            found = asdict(compare_engines(reference, model, read, options, progress=progress))
    except KeyboardInterrupt:
        print(f"stopped: {progress}; the same command begins again", file=sys.stderr)
        return 130
    dtypes = [name_of(one.model.transformer.norm.weight.dtype) for one in (reference, model)]
    how = {"reference": reference.name, "model": model.name, "texts": list(texts)}
    how |= {"context": context, "dtype": dtypes[1], "reference_dtype": dtypes[0]}
    show(f"{model.name} against {reference.name} on {named(texts)}", how, found, args.json)
    return 0
