"""Side by side with mlx-lm in one process: decoding, time to first token, batches, speculation.

    python -m openelm_mlx.benchmarks.scripts.against_mlx_lm FOLDER [--draft FOLDER] [--text FILE] [--only decode,first,batch,drafts]

Runs alternate, so that a busy machine hits both alike; each line is the median of the ratios with
its range, and says whether the tokens were the same. Without a FOLDER, random weights of
`--random-weights SIZE` are measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from openelm_mlx import batch_generate, load, stream_generate
from openelm_mlx.benchmarks.measure.weights import random_engine, write_folder
from openelm_mlx.benchmarks.peers.openelm import TEXT
from openelm_mlx.device import mx
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.options import SamplingOptions
from openelm_mlx.engine.sampling import Context, Controls, Filters, draw, seed_key
from openelm_mlx.errors import BenchmarkError
from openelm_mlx.model.decoder import OpenELM

REFRAINS = (
    "And the wolf ran on and on.",
    "They walked and walked and walked.",
    '"Who is there?" asked the old woman.',
    "He gave the beggar a penny.",
    'The bird sang, "Tweet, tweet, tweet."',
    '"I will not go," said the prince.',
    "The mother wept.",
    "He ran and ran.",
    "No, no, no, said the cat.",
    '"What do you see?" "I see the sea."',
)
Times = tuple[float, Any]  # seconds (or tokens a pass) and the tokens to compare


def paired(
    name: str, ours: Callable[[], Times], theirs: Callable[[], Times], trials: int, note: str = ""
) -> float:
    """Median of theirs / ours over alternating runs, the first pair left out; prints its line."""
    ratios, same = [], True
    for trial in range(trials + 1):
        (mine, my_tokens), (their, their_tokens) = (
            (ours(), theirs()) if trial % 2 else (theirs(), ours())[::-1]
        )
        same = same and my_tokens == their_tokens
        if trial:
            ratios.append(their / mine)
    print(
        f"{name:<44} {median(ratios):5.2f} x  ({min(ratios):.2f}-{max(ratios):.2f}, {trials} pairs, tokens "
        f"{'equal' if same else 'DIFFER'}){note}",
        flush=True,
    )
    return median(ratios)


def decode_speed(engine: Engine, model: Any, prompt: list[int], tokens: int, trials: int) -> None:
    """Seconds from the first token to the last, and from the prompt to the first."""
    from mlx_lm.generate import generate_step

    def ours(count: int, from_first: bool) -> Times:
        start, found = perf_counter(), list[Any]()
        for event in stream_generate(engine, prompt, max_tokens=count, ignore_eos=True):
            if from_first and not found:
                start = perf_counter()
            found.append(event.token)
        return perf_counter() - start, found

    def theirs(count: int, from_first: bool) -> Times:
        start, found = perf_counter(), list[Any]()
        with closing(generate_step(mx.array(prompt), model, max_tokens=count)) as steps:
            for token, _ in steps:
                if from_first and not found:
                    start = perf_counter()
                found.append(int(token))
        elapsed = perf_counter() - start
        mx.synchronize()
        return elapsed, found

    if tokens > 1:
        paired(
            f"decode, {tokens} tokens after {len(prompt)}",
            lambda: ours(tokens, True),
            lambda: theirs(tokens, True),
            trials,
        )
    else:
        paired(
            f"first token of {len(prompt)}",
            lambda: ours(1, False),
            lambda: theirs(1, False),
            trials,
        )


def batch_speed(
    engine: Engine, model: Any, tokenizer: Any, text: str, tokens: int, trials: int
) -> None:
    """16 prompts of 64 tokens, whole run."""
    from mlx_lm.generate import batch_generate as their_batch

    ids = engine.tokenizer.encode(text)
    prompts = [ids[:1] + ids[1 + 63 * row : 64 + 63 * row] for row in range(16)]
    if len(prompts[-1]) < 64:
        raise BenchmarkError(
            f"the text has {len(ids)} tokens; 16 prompts of 64 need more. Give a longer one with --text"
        )
    tokenizer._eos_token_ids = set()  # every sequence runs to its end, in both

    def ours() -> Times:
        start = perf_counter()
        found = [
            list(result.tokens)
            for result in batch_generate(engine, prompts, max_tokens=tokens, ignore_eos=True)
        ]
        return perf_counter() - start, found

    def theirs() -> Times:
        start = perf_counter()
        texts = their_batch(model, tokenizer, prompts, max_tokens=tokens).texts
        return perf_counter() - start, texts

    mine, his = ours()[1], theirs()[1]
    same = sum(tokenizer.decode(a).strip() == b.strip() for a, b in zip(mine, his, strict=True))
    single = [
        [
            event.token
            for event in stream_generate(engine, prompt, max_tokens=tokens, ignore_eos=True)
        ]
        for prompt in prompts
    ]
    note = f"; {same} of 16 texts as mlx-lm's, {sum(a == b for a, b in zip(mine, single, strict=True))} of 16 as alone"
    paired(
        f"batch of 16, {tokens} tokens after 64",
        lambda: (ours()[0], 0),
        lambda: (theirs()[0], 0),
        trials,
        note,
    )


def tokens_per_pass(
    target: Engine, draft: Engine, models: tuple[Any, Any], text: str, tokens: int, drafted: int
) -> None:
    """20 prompts cut from the text, at temperature 0 and 1; then prompt lookup on texts that quote
    themselves.
    """
    from mlx_lm.generate import speculative_generate_step
    from mlx_lm.sample_utils import make_sampler

    cut = len(text) // 20
    prompts = [target.tokenizer.encode(text[row * cut : row * cut + 300]) for row in range(20)]
    for temperature in (0.0, 1.0):
        settings: dict[str, Any] = {
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": temperature,
        }
        made = {"fixed": [0, 0], "adaptive": [0, 0], "mlx-lm": [0, 0]}
        same = 0
        for seed, prompt in enumerate(prompts):
            for name, adaptive in (("fixed", False), ("adaptive", True)):
                events = list(
                    stream_generate(
                        target,
                        prompt,
                        draft=draft,
                        seed=seed,
                        draft_tokens=drafted,
                        adaptive_draft=adaptive,
                        **settings,
                    )
                )
                stats = events[-1].stats
                made[name][0] += 0 if stats is None else stats.generation_tokens - 1
                made[name][1] += 0 if stats is None else stats.target_passes
                if not temperature:
                    same += [e.token for e in events] == [
                        e.token for e in stream_generate(target, prompt, **settings)
                    ]
            mx.random.seed(seed)
            steps = speculative_generate_step(
                mx.array(prompt),
                *models,
                num_draft_tokens=drafted,
                max_tokens=tokens,
                sampler=make_sampler(temperature),
            )
            flags = [from_draft for _, _, from_draft in steps]
            made["mlx-lm"][0] += len(flags)
            made["mlx-lm"][1] += flags.count(
                False
            )  # every pass ends with one token of the target's own
        found = {name: done / passes for name, (done, passes) in made.items()}
        print(
            f"temperature {temperature}, draft of {drafted}: tokens per pass {found['fixed']:.3f}, adaptive "
            f"{found['adaptive']:.3f}, mlx-lm {found['mlx-lm']:.3f}: {found['fixed'] / found['mlx-lm']:.2f} x"
            + ("" if temperature else f"; {same} of 40 as plain"),
            flush=True,
        )


def acceptance(target: Engine, draft: Engine, text: str, tokens: int) -> None:
    """How often the two models draw the same token at temperature 1, along 20 texts that the target
    continued.
    """
    options, vocab = SamplingOptions(temperature=1.0), target.vocab
    filters, cut = Filters.of([options]), len(text) // 20
    found = []
    for seed in range(20):
        prompt = target.tokenizer.encode(text[seed * cut : seed * cut + 300])
        events = list(
            stream_generate(target, prompt, options, max_tokens=tokens, ignore_eos=True, seed=seed)
        )
        whole = mx.array([prompt + [event.token for event in events]])
        places = mx.arange(len(prompt), whole.size)
        controls, keys = (
            Controls.of([options] * places.size, filters, vocab),
            mx.repeat(seed_key(seed), places.size, axis=0),
        )
        logits = [
            engine.model(whole)[0, len(prompt) - 1 : -1, :vocab].astype(mx.float32)
            for engine in (target, draft)
        ]
        ours, theirs = (
            draw(scores, filters, Context(controls, keys, places, whole[0, places - 1]))
            for scores in logits
        )
        p, q = (mx.softmax(scores, axis=-1) for scores in logits)
        order = mx.argsort(
            q / mx.maximum(p, 1e-30), axis=-1
        )  # tokens that the target prefers come first
        p, q = (mx.take_along_axis(each, order, axis=-1) for each in (p, q))
        # both draw x with probability 1 / sum over y of max(p(y) / p(x), q(y) / q(x))
        above, below = mx.cumsum(p, axis=-1), 1 - mx.cumsum(q, axis=-1)
        both = 1 / (above / mx.maximum(p, 1e-30) + mx.maximum(below, 0) / mx.maximum(q, 1e-30))
        found.append(
            mx.stack(
                [
                    (ours == theirs).astype(mx.float32),
                    both.sum(-1),
                    mx.minimum(p, q).sum(-1),
                    (p * q).sum(-1),
                ]
            )
        )
    values: Any = mx.concatenate(found, axis=1).mean(axis=1).tolist()
    drawn, coupled, most, independent = values
    print(
        f"drafts kept at temperature 1, {tokens * 20} positions: {drawn:.3f}; expected of one noise {coupled:.3f}, "
        f"most possible {most:.3f} ({drawn / most:.2f} of it), of independent draws {independent:.3f}",
        flush=True,
    )


def lookup_per_pass(target: Engine) -> None:
    """Ten refrains, each four times, continued by 256 tokens."""
    done, passes, same = 0, 0, 0
    for refrain in REFRAINS:
        settings: dict[str, Any] = {"max_tokens": 256, "ignore_eos": True}
        events = list(
            stream_generate(
                target, " ".join([refrain] * 4), prompt_lookup=2, draft_tokens=16, **settings
            )
        )
        stats = events[-1].stats
        done += 0 if stats is None else stats.generation_tokens - 1
        passes += 0 if stats is None else stats.target_passes
        plain = [
            event.token for event in stream_generate(target, " ".join([refrain] * 4), **settings)
        ]
        same += plain == [event.token for event in events]
    print(
        f"prompt lookup on 10 refrains: {done / passes:.2f} tokens per pass; {same} of 10 as plain",
        flush=True,
    )


def loss_where_nothing_is_accepted(
    target: Engine, draft: Engine, prompt: list[int], tokens: int, trials: int
) -> None:
    """Plain speed over the speed with a draft that is never right: a draft model of random weights,
    and lookup in a text sampled at a temperature where nothing repeats.
    """
    useless = Engine(
        OpenELM(draft.config), target.tokenizer, draft.config, "random weights", target.path
    )
    mx.eval(useless.model.parameters())

    def run(**settings: Any) -> Times:
        events = list(
            stream_generate(target, prompt, max_tokens=tokens, ignore_eos=True, **settings)
        )
        stats = events[-1].stats
        return (
            0.0 if stats is None else stats.total_seconds - stats.time_to_first_token_seconds,
            None,
        )

    paired("a useless draft model: plain time over its", lambda: run(draft=useless), run, trials)
    noise: dict[str, Any] = {"temperature": 5.0, "seed": 1}
    paired(
        "lookup in noise: plain time over its",
        lambda: run(prompt_lookup=3, **noise),
        lambda: run(**noise),
        trials,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="against_mlx_lm", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", nargs="?", help="a model folder")
    parser.add_argument(
        "--random-weights",
        metavar="SIZE",
        help="a published size with random float32 weights, instead",
    )
    parser.add_argument("--draft", metavar="FOLDER", help="a draft model with the same tokenizer")
    parser.add_argument("--text", metavar="FILE", help="prompts are cut from it")
    parser.add_argument(
        "--only", default="decode,first,batch,drafts", help="default: decode,first,batch,drafts"
    )
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--draft-tokens", type=int, default=4)
    parser.add_argument("--trials", type=int, default=7)
    args = parser.parse_args(argv)
    with TemporaryDirectory() as scratch:
        if not args.folder and not args.random_weights:
            parser.error("give a FOLDER, or --random-weights SIZE")
        folder = (
            Path(args.folder)
            if args.folder
            else write_folder(random_engine(args.random_weights, "float32"), Path(scratch))
        )
        target, only = load(folder), args.only.split(",")
        from mlx_lm import load as their_load

        model, tokenizer = their_load(str(folder))[:2]
        text = Path(args.text).read_text(encoding="utf-8") if args.text else TEXT * 12
        ids = target.tokenizer.encode(text)
        if "decode" in only:
            decode_speed(target, model, ids[:32], args.tokens, args.trials)
        if "first" in only:
            decode_speed(target, model, ids[:32], 1, args.trials)
        if "batch" in only:
            batch_speed(target, model, tokenizer, text, args.tokens, args.trials)
        if "drafts" in only and args.draft:
            draft = load(args.draft)
            models = (model, their_load(args.draft)[0])
            acceptance(target, draft, text, args.tokens)
            tokens_per_pass(target, draft, models, text, args.tokens, args.draft_tokens)
            lookup_per_pass(target)
            loss_where_nothing_is_accepted(target, draft, ids[:32], 200, args.trials)
    return 0


if __name__ == "__main__":
    sys.exit(main())
