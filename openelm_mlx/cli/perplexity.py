"""`openelm perplexity`: how well a model predicts a text."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from typing import Any

from openelm_mlx.cli.display import utf8_stdin
from openelm_mlx.cli.evaluate import Progress
from openelm_mlx.cli.options import (
    MODEL_HELP,
    add_flags,
    add_model_flags,
    from_args,
    given_path,
    load_model,
)
from openelm_mlx.errors import PromptError
from openelm_mlx.evaluate.options import TextOptions

DESCRIPTION = """Measure how well a model predicts text: perplexity, nats per token, and bits per
byte, which compares models of different tokenizers. The model reads windows that begin with BOS, as
it did when it was trained. The 95 % intervals speak of text like the one that was read. The same
command goes on after Ctrl-C or a kill."""

EXAMPLES = """examples:
  openelm perplexity 270m --text long.txt
  openelm perplexity my-model --text long.txt --text letter.txt --json
  openelm perplexity my-model --text long.txt --context 64 --stride 32
  cat long.txt | openelm perplexity --text -
  mlx.launch -n 2 -- python -m openelm_mlx perplexity 270m --text long.txt

Windows of 512 tokens are those of `openelm convert --verify` and `openelm compare`, so that figures
can be compared. With --stride every token but the first ones has more before it, which is nearer to
how a model is used, and costs more passes.
"""


def register(commands: Any) -> None:
    parser = commands.add_parser(
        "perplexity",
        help="how well a model predicts a text",
        description=DESCRIPTION,
        epilog=EXAMPLES,
    )
    named: Any = {"nargs": "?", "default": "openelm-tiny"}
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP, **named)
    add_text_flag(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_flags(parser, TextOptions)
    add_model_flags(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    options, texts = from_args(TextOptions, args), read_texts(args.text)
    engine = load_model(args.model, args)
    from openelm_mlx.dtypes import name_of
    from openelm_mlx.engine.ranks import launched
    from openelm_mlx.evaluate.perplexity import text_perplexity, window
    from openelm_mlx.evaluate.store import Store

    context, stride = window(options, engine)
    ranks = launched()
    progress = Progress(engine.name, ranks.rank > 0, "the text", "parts")
    with Store(engine, options.batch_tokens) as store:
        try:
            with progress:
                how: Any = {"store": store, "ranks": ranks, "progress": progress}
                found = asdict(text_perplexity(engine, list(texts.values()), options, **how))
        except KeyboardInterrupt:
            if ranks.rank == 0:
                print(f"stopped: {progress}; the same command goes on", file=sys.stderr)
            return 130
        dtype = name_of(engine.model.transformer.norm.weight.dtype)
        how = {"model": engine.name, "texts": list(texts), "context": context, "stride": stride}
        if ranks.rank == 0:
            show(f"{engine.name} on {named(texts)}", {**how, "dtype": dtype}, found, args.json)
        ranks.gather("")  # the first has shown it, so that nobody's answers are needed any more
        store.finish()
    return 0


def show(title: str, how: dict[str, Any], found: dict[str, Any], as_json: bool) -> None:
    """Print figures, below what they are of and how they came about, or all as one JSON object."""
    from openelm_mlx.evaluate.compare import losses_shown

    if as_json:
        print(json.dumps({**how, **found}, ensure_ascii=False))
        return
    print(title)
    types = dict.fromkeys(how[name] for name in ("reference_dtype", "dtype") if name in how)
    stride = how.get("stride", how["context"] - 1)
    apart = "" if stride == how["context"] - 1 else f", {stride} apart"
    print(f"windows of {how['context']:,} tokens{apart}, computed in {' and '.join(types)}")
    for name, value in losses_shown(found):
        print(f"{name}: {value}")
    sys.stdout.flush()


def add_text_flag(parser: argparse.ArgumentParser) -> None:
    """Add the flag of the texts that are read."""
    text = "a text in UTF-8, or - for stdin; may be given several times (default: paragraphs of "
    text += "Darwin's that come with the package, as for convert --verify)"
    parser.add_argument("--text", metavar="FILE", action="append", help=text)


def read_texts(names: list[str] | None) -> dict[str, str]:
    """Return the texts that were named, or the one of this package. Raises an `OpenELMError`."""
    from openelm_mlx.engine.tokenizer import check_text
    from openelm_mlx.evaluate import perplexity
    from openelm_mlx.files import MAX_TEXT_BYTES, check_text_size, read_text

    if names is None:
        return {perplexity.TEXT_NAME: read_text(perplexity.TEXT, "--text")}
    texts = {}
    for name in names:
        if not name:
            raise PromptError("--text is empty; give the name of a file, or - for stdin")
        if name in texts:
            raise PromptError(f"--text {name} is given twice; give it once")
        if name == "-":
            text = utf8_stdin().read(MAX_TEXT_BYTES + 1)
            check_text_size(len(text), name, "--text")
        else:
            text = read_text(given_path(name), "--text")
        if not text:
            raise PromptError(f"--text {name} is empty; give a text of one character or more")
        if "\0" in text:
            raise PromptError(f"--text {name} is not text; give a file of text")
        check_text(text)
        texts[name] = text
    return texts


def named(texts: dict[str, str]) -> str:
    """Return what the texts are called in a sentence."""
    return ", ".join("standard input" if name == "-" else name for name in texts)
