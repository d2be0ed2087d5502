"""Compare sampling settings for a model's chat, by the stories that it tells under them.

    python tests/tools/chat_defaults.py MODEL EXACT ANSWERS.jsonl [--own]

EXACT is the same model unquantized, under which the perplexity of the answers is taken. ANSWERS
collects them, a line for each setting: a run that was cut off goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from statistics import fmean, median

from openelm_mlx import batch_generate, load
from openelm_mlx.engine.conversation import encode_messages
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.options import SamplingOptions
from openelm_mlx.evaluate.score import perplexity_of, score

SUBJECTS = (
    *("a king", "a dog", "a princess who could not laugh", "a poor fisherman and his wife"),
    *("two brothers", "a clever fox", "a boy who went to sea", "a wolf and three sheep"),
    *("a garden", "the moon", "a giant and a tailor", "a girl who was lost in the snow"),
)
PROMPTS = (
    *(f"Tell me a story about {subject}." for subject in SUBJECTS),
    "Tell me a story.",
    "Tell me about a witch who lived in the forest.",
    "Tell me a fairy tale about a golden bird.",
    "What did the old woman find in the well?",
    "Write a story about a horse that could speak.",
    "Tell me how the prince came home.",
    "Tell me a long story about a castle by the sea.",
    "Who lived in the little house?",
)
SEEDS = (1, 2, 3)
GRID = (
    SamplingOptions(),
    SamplingOptions(repetition_penalty=1.2),
    SamplingOptions(temperature=0.5, repetition_penalty=1.2),
    SamplingOptions(temperature=0.7, repetition_penalty=1.2),
    SamplingOptions(temperature=0.7, top_p=0.9, repetition_penalty=1.2),
    *(SamplingOptions(temperature=0.7, min_p=0.1, repetition_penalty=p) for p in (1.1, 1.15, 1.2)),
    SamplingOptions(temperature=0.5, min_p=0.3, presence_penalty=1.3),
    SamplingOptions(temperature=0.5, min_p=0.3, presence_penalty=1.0, frequency_penalty=0.2),
)
MAX_TOKENS = 256  # what a chat gives an answer unless told otherwise
GRAM, MAY_OCCUR = 6, 2  # an answer loops when a sequence of six words occurs more than twice
WORDS = 60  # an answer of fewer words must have ended by itself


@dataclass(frozen=True)
class Answer:
    """One answer of the model, to one prompt with one seed."""

    prompt: list[int]
    tokens: list[int]
    text: str
    ended: bool  # by the end-of-text token

    @property
    def words(self) -> int:
        return len(self.text.split())

    @property
    def loops(self) -> bool:
        """Whether some sequence of six words occurs more than twice."""
        words = self.text.lower().split()
        grams = Counter(tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1))
        return max(grams.values(), default=0) > MAY_OCCUR

    @property
    def too_short(self) -> bool:
        return not self.ended and self.words < WORDS


def answers(engine: Engine, sampling: SamplingOptions) -> list[Answer]:
    """Return the first answer of a chat to every prompt, with every seed unless it does not
    matter.
    """
    seeds = SEEDS[:1] if sampling.greedy else SEEDS
    chats = [[{"role": "user", "content": text}] for text in PROMPTS for _ in seeds]
    prompts = [encode_messages(engine.tokenizer, messages) for messages in chats]
    samplings = [replace(sampling, seed=seed) for _ in PROMPTS for seed in seeds]
    results = batch_generate(engine, prompts, samplings, slots=20, max_tokens=MAX_TOKENS)
    ends = engine.config.eos_token_ids
    return [
        Answer(prompt, list(result.tokens), result.text, result.tokens[-1] in ends)
        for prompt, result in zip(prompts, results, strict=True)
    ]


def answer_perplexity(exact: Engine, found: Sequence[Answer]) -> float:
    """Return the perplexity of all answers' tokens, each after its prompt, at temperature 1."""
    scores = score(exact, [answer.prompt + answer.tokens for answer in found])
    starts = [len(answer.prompt) - 1 for answer in found]
    own = [p for row, start in zip(scores, starts, strict=True) for p in row[start:]]
    return perplexity_of(-fmean(own))


def label(sampling: SamplingOptions) -> str:
    """Return the options that differ from their defaults."""
    plain = vars(SamplingOptions())
    given = {field.name: getattr(sampling, field.name) for field in fields(sampling)}
    changed = [f"{name} {value}" for name, value in given.items() if value != plain[name]]
    return ", ".join(["greedy"] * sampling.greedy + changed)


def row(name: str, found: Sequence[Answer], exact: Engine) -> str:
    """Return one line of the table."""
    words = [answer.words for answer in found]
    return (
        f"| {name} | {sum(answer.loops for answer in found)} of {len(found)} "
        f"| {sum(answer.too_short for answer in found)} | {sum(answer.ended for answer in found)} "
        f"| {median(words):g} ({min(words)}-{max(words)}) | {answer_perplexity(exact, found):.1f} |"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="chat_defaults", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("exact")
    parser.add_argument("answers", type=Path)
    parser.add_argument("--own", action="store_true", help="only the model's own defaults")
    args = parser.parse_args(argv)
    engine, exact = load(args.model), load(args.exact)
    lines = args.answers.read_text(encoding="utf-8").splitlines() if args.answers.exists() else []
    known = {name: [Answer(**parts) for parts in found] for name, found in map(json.loads, lines)}
    print("| sampling | loops | too short | ended | words: median (range) | perplexity |")
    print("|---|---:|---:|---:|---:|---:|")
    own = engine.chat_sampling
    for sampling in dict.fromkeys((own,) if args.own else (*GRID, own)):
        name = label(sampling)
        if name not in known:
            known[name] = answers(engine, sampling)
            with args.answers.open("a", encoding="utf-8") as file:
                file.write(json.dumps([name, [vars(answer) for answer in known[name]]]) + "\n")
        print(row(name + " (the model's own)" * (sampling == own), known[name], exact), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
