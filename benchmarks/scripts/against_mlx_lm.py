"""Side by side with mlx-lm in one process: decoding, time to first token, batches, speculation.

    python -m openelm_mlx.benchmarks.scripts.against_mlx_lm FOLDER [--draft FOLDER] [--text FILE]

Both take turns, so that a busy machine slows both alike; each line is the mean of the ratios with
its 95 % interval, and says whether the tokens were the same. Without a FOLDER, random weights of
`--random-weights SIZE` are measured.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

from openelm_mlx import batch_generate, load, stream_generate
from openelm_mlx.benchmarks.peers.on_mlx import TEXT
from openelm_mlx.benchmarks.scripts.pairs import in_turns, model_folder, ratio_text
from openelm_mlx.device import mx
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.options import SamplingOptions
from openelm_mlx.engine.sampling import Context, Controls, Filters, draw, seed_key
from openelm_mlx.errors import BenchmarkError, OpenELMError
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
PARTS = ("decode", "first", "batch", "drafts")
TEXTS = 20  # prompts that are cut from the text for drafts
Timed = tuple[float, Any]  # seconds, and the tokens if they are to be compared


@dataclass(frozen=True)
class Setting:
    """What is compared: this engine's model, mlx-lm's of the same folder, and how much they do."""

    engine: Engine
    model: Any
    tokenizer: Any
    text: str
    tokens: int
    trials: int

    @property
    def prompt(self) -> list[int]:
        return self.engine.tokenizer.encode(self.text)[:32]

    @property
    def prompts(self) -> list[list[int]]:
        cut = len(self.text) // TEXTS
        starts = [self.text[row * cut : row * cut + 300] for row in range(TEXTS)]
        return [self.engine.tokenizer.encode(start) for start in starts]


def compare(name: str, ours: Callable[[], Timed], theirs: Callable[[], Timed], trials: int) -> None:
    """Print the mean of theirs / ours; the first pair is not counted."""
    pairs = list(in_turns(ours, theirs, trials + 1))
    ratio = ratio_text([their for _, (their, _) in pairs[1:]], [mine for (mine, _), _ in pairs[1:]])
    equal = all(mine == their for (_, mine), (_, their) in pairs)
    compared = pairs[0][0][1] is not None
    tokens = (", tokens DIFFER", ", tokens equal")[equal] if compared else ""
    print(f"{name:<44} {ratio}{tokens})", flush=True)


def answer(engine: Engine, prompt: Any, tokens: int, **settings: Any) -> tuple[list[Any], Any]:
    """Return the tokens of an answer that does not end early, and its statistics."""
    events = list(stream_generate(engine, prompt, max_tokens=tokens, ignore_eos=True, **settings))
    return [event.token for event in events], events[-1].stats


def decode_speed(given: Setting, tokens: int) -> None:
    """Compare the seconds from the first token to the last, or to the first if `tokens` is 1."""
    from mlx_lm.generate import generate_step

    def timed(steps: Any) -> Timed:
        start, found = perf_counter(), list[Any]()
        with closing(steps):
            for token in steps:
                if not found and tokens > 1:
                    start = perf_counter()
                found.append(token)
        elapsed = perf_counter() - start
        mx.synchronize()
        return elapsed, found

    def ours() -> Timed:
        events = stream_generate(given.engine, given.prompt, max_tokens=tokens, ignore_eos=True)
        return timed(event.token for event in events)

    def theirs() -> Timed:
        steps = generate_step(mx.array(given.prompt), given.model, max_tokens=tokens)
        return timed(int(token) for token, _ in steps)

    length = len(given.prompt)
    name = f"decode, {tokens} tokens after {length}" if tokens > 1 else f"first token of {length}"
    compare(name, ours, theirs, given.trials)


def batch_speed(given: Setting) -> None:
    """Compare the time of a batch of 16 prompts of 64 tokens, from start to end."""
    from mlx_lm.generate import batch_generate as their_batch

    ids = given.engine.tokenizer.encode(given.text)
    prompts = [ids[:1] + ids[1 + 63 * row : 64 + 63 * row] for row in range(16)]
    if len(prompts[-1]) < 64:
        short = f"the text has {len(ids)} tokens; 16 prompts of 64 need more"
        raise BenchmarkError(f"{short}. Give a longer one with --text")
    given.tokenizer._eos_token_ids = set()  # every sequence runs to its end, in both
    settings: dict[str, Any] = {"max_tokens": given.tokens}

    def ours() -> list[list[int | None]]:
        results = batch_generate(given.engine, prompts, ignore_eos=True, **settings)
        return [list(result.tokens) for result in results]

    def theirs() -> list[str]:
        return their_batch(given.model, given.tokenizer, prompts, **settings).texts

    def timed(side: Callable[[], Any]) -> Timed:
        start = perf_counter()
        side()
        return perf_counter() - start, None

    tokens = ours()
    texts = [given.tokenizer.decode(row).strip() for row in tokens]
    equal = sum(a == b.strip() for a, b in zip(texts, theirs(), strict=True))
    alone = [answer(given.engine, prompt, given.tokens)[0] for prompt in prompts]
    single = sum(a == b for a, b in zip(tokens, alone, strict=True))
    print(f"batch of 16: {equal} of 16 texts as mlx-lm's, {single} of 16 as alone", flush=True)
    name = f"batch of 16, {given.tokens} tokens after 64"
    compare(name, lambda: timed(ours), lambda: timed(theirs), given.trials)


def tokens_per_pass(given: Setting, draft: Engine, their_draft: Any, drafted: int) -> None:
    """Print the tokens per pass of 20 prompts cut from the text, at temperature 0 and 1."""
    from mlx_lm.generate import speculative_generate_step
    from mlx_lm.sample_utils import make_sampler

    for temperature in (0.0, 1.0):
        done, passes, same = Counter[str](), Counter[str](), 0
        for seed, prompt in enumerate(given.prompts):
            options: dict[str, Any] = {"temperature": temperature, "seed": seed}
            plain, _ = answer(given.engine, prompt, given.tokens, **options)
            for name in ("fixed", "adaptive"):
                lengths = {"draft_tokens": drafted, "adaptive_draft": name == "adaptive"}
                options |= {"draft": draft, **lengths}
                tokens, stats = answer(given.engine, prompt, given.tokens, **options)
                done[name] += stats.generation_tokens - 1
                passes[name] += stats.target_passes
                same += tokens == plain
            mx.random.seed(seed)
            steps = speculative_generate_step(
                mx.array(prompt),
                given.model,
                their_draft,
                num_draft_tokens=drafted,
                max_tokens=given.tokens,
                sampler=make_sampler(temperature),
            )
            from_draft = [flag for _, _, flag in steps]
            done["mlx-lm"] += len(from_draft)
            # every pass ends with one token of the target's own
            passes["mlx-lm"] += from_draft.count(False)
        found = {name: done[name] / passes[name] for name in done}
        figures = ", ".join(f"{name} {rate:.3f}" for name, rate in found.items())
        ratio = f"{found['fixed'] / found['mlx-lm']:.2f} x; {same} of {2 * TEXTS} as plain"
        head = f"temperature {temperature}, draft of {drafted}: tokens per pass"
        print(f"{head} {figures}: {ratio}", flush=True)


def acceptance(given: Setting, draft: Engine) -> None:
    """Print how often two models draw the same token at temperature 1.

    They are compared along 20 texts that the target continued.
    """
    target, vocab = given.engine, given.engine.vocab
    options = SamplingOptions(temperature=1.0)
    filters, found = Filters.of([options]), []
    for seed, prompt in enumerate(given.prompts):
        tokens, _ = answer(target, prompt, given.tokens, temperature=1.0, seed=seed)
        text = mx.array([prompt + tokens])
        places = mx.arange(len(prompt), text.size)
        controls = Controls.of([options] * places.size, filters, vocab)
        keys = mx.repeat(seed_key(seed), places.size, axis=0)
        logits = [
            engine.model(text)[0, len(prompt) - 1 : -1, :vocab].astype(mx.float32)
            for engine in (target, draft)
        ]
        ours, theirs = (
            draw(scores, filters, Context(controls, keys, places, text[0, places - 1]))
            for scores in logits
        )
        p, q = (mx.softmax(scores, axis=-1) for scores in logits)
        order = mx.argsort(q / mx.maximum(p, 1e-30), axis=-1)  # the target's favourites come first
        p, q = (mx.take_along_axis(each, order, axis=-1) for each in (p, q))
        # both draw x with probability 1 / sum over y of max(p(y) / p(x), q(y) / q(x))
        above, below = mx.cumsum(p, axis=-1), 1 - mx.cumsum(q, axis=-1)
        both = 1 / (above / mx.maximum(p, 1e-30) + mx.maximum(below, 0) / mx.maximum(q, 1e-30))
        best, independent = mx.minimum(p, q).sum(-1), (p * q).sum(-1)
        found.append(mx.stack([ours == theirs, both.sum(-1), best, independent]))
    rates: Any = mx.concatenate(found, axis=1).mean(axis=1).tolist()
    drawn, coupled, most, apart = rates
    print(
        f"drafts kept at temperature 1, {given.tokens * TEXTS} positions: {drawn:.3f}; "
        f"expected of one noise {coupled:.3f}, most possible {most:.3f} "
        f"({drawn / most:.2f} of it), of independent draws {apart:.3f}",
        flush=True,
    )


def lookup_per_pass(engine: Engine) -> None:
    """Print the tokens per pass of ten refrains, each four times, continued by 256 tokens."""
    done, passes, same = 0, 0, 0
    for refrain in REFRAINS:
        prompt = " ".join([refrain] * 4)
        tokens, stats = answer(engine, prompt, 256, prompt_lookup=2, draft_tokens=16)
        done += stats.generation_tokens - 1
        passes += stats.target_passes
        same += tokens == answer(engine, prompt, 256)[0]
    rate = f"{done / passes:.2f} tokens per pass"
    print(f"prompt lookup on 10 refrains: {rate}; {same} of 10 as plain", flush=True)


def useless_drafts(given: Setting, draft: Engine) -> None:
    """Print the plain time over the time with a draft that is never right.

    That is a draft model of random weights, and lookup in a text sampled at a temperature if
    nothing repeats.
    """
    engine = given.engine
    model = OpenELM(draft.config)
    mx.eval(model.parameters())
    useless = Engine(model, engine.tokenizer, draft.config, "random weights", engine.path)

    def run(**settings: Any) -> Timed:
        _, stats = answer(engine, given.prompt, 200, **settings)
        return stats.total_seconds - stats.time_to_first_token_seconds, None

    noise: dict[str, Any] = {"temperature": 5.0, "seed": 1}
    compare(
        "a useless draft model: plain time over its", lambda: run(draft=useless), run, given.trials
    )
    compare(
        "lookup in noise: plain time over its",
        lambda: run(prompt_lookup=3, **noise),
        lambda: run(**noise),
        given.trials,
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="against_mlx_lm", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("folder", nargs="?", help="a model folder")
    random = "a published size with random float32 weights, instead"
    add("--random-weights", metavar="SIZE", help=random)
    add("--draft", metavar="FOLDER", help="a draft model with the same tokenizer")
    add("--text", metavar="FILE", help="prompts are cut from it")
    add("--only", metavar="PART,...", help=f"default: {','.join(PARTS)}")
    add("--tokens", type=int, default=64, help="of each answer (default: 64)")
    add("--draft-tokens", type=int, default=4, help="of each draft (default: 4)")
    add("--trials", type=int, default=7, help="pairs of runs (default: 7)")
    args = parser.parse_args(argv)
    if not args.folder and not args.random_weights:
        parser.error("give a FOLDER, or --random-weights SIZE")
    only = args.only.split(",") if args.only else PARTS if args.draft else PARTS[:-1]
    if unknown := [part for part in only if part not in PARTS]:
        parser.error(f"--only names {', '.join(unknown)}; known: {', '.join(PARTS)}")
    if "drafts" in only and not args.draft:
        parser.error("--only drafts needs a draft model; give --draft FOLDER")
    try:
        measure(args, only)
    except OpenELMError as error:
        parser.exit(2, f"against_mlx_lm: {error}\n")
    return 0


def measure(args: argparse.Namespace, only: Sequence[str]) -> None:
    """Print what was asked for, part by part."""
    text = Path(args.text).read_text(encoding="utf-8") if args.text else TEXT * 12
    with TemporaryDirectory() as scratch:
        folder = args.folder or model_folder(f"random:{args.random_weights}", scratch)
        engine = load(folder)
        from mlx_lm import load as load_mlx_lm

        model, tokenizer = load_mlx_lm(folder)[:2]
        given = Setting(engine, model, tokenizer, text, args.tokens, args.trials)
        if "decode" in only:
            decode_speed(given, args.tokens)
        if "first" in only:
            decode_speed(given, 1)
        if "batch" in only:
            batch_speed(given)
        if "drafts" in only:
            draft = load(args.draft)
            acceptance(given, draft)
            tokens_per_pass(given, draft, load_mlx_lm(args.draft)[0], args.draft_tokens)
            lookup_per_pass(given.engine)
            useless_drafts(given, draft)


if __name__ == "__main__":
    raise SystemExit(main())
