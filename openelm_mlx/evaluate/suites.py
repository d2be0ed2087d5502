"""The suites: what a model is asked for a table that Apple published, and Apple's figures.

The figures stand in `published.json` with their source and protocol, as do the shots of each task.
Nothing here needs MLX or lm-eval.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

AVERAGE = "average"  # the last column of each table
NAME = re.compile(r"(?:openelm-)?(270m|450m|1[._]1b|3b)(-instruct)?(?:-(?:[2-8]bit|fp16|bf16))?")
LORA = "-LoRA"  # how a row ends that is of CoreNet's fine-tuned weights


@dataclass(frozen=True)
class Task:
    """A task of lm-eval as a column of a table.

    A column may be any of the `metrics`: the card does not say which. The number of questions is
    that of the split which lm-eval asks; every published figure is a whole number of these, but for
    the probabilities of TruthfulQA.
    """

    title: str  # as the card heads the column
    questions: int
    metrics: tuple[str, ...] = ("acc",)
    note: str = ""
    reworded: bool = False  # some prompts differ from those of lm-eval in Apple's run


EITHER = ("acc", "acc_norm")
STEREOTYPES = (
    "the share of pairs whose stereotyped sentence is the likelier one: not an accuracy; nearer "
    "50 is better"
)
MC2 = "the mean probability of the true answers, not a share of questions"

TASKS: Mapping[str, Task] = {
    "arc_challenge": Task("ARC-c", 1172, EITHER),
    "arc_easy": Task("ARC-e", 2376, EITHER),
    "boolq": Task("BoolQ", 3270),
    "crows_pairs_english": Task("CrowS-Pairs", 1677, ("pct_stereotype",), STEREOTYPES, True),
    "hellaswag": Task("HellaSwag", 10042, EITHER),
    "mmlu": Task(
        "MMLU", 14042, reworded=True
    ),  # a group of 57 tasks, each question of which counts the same
    "piqa": Task("PIQA", 1838, EITHER),
    "race": Task("RACE", 1045, reworded=True),
    "sciq": Task("SciQ", 1000, EITHER),
    "truthfulqa_mc2": Task("TruthfulQA-mc2", 817, note=MC2),
    "winogrande": Task("WinoGrande", 1267),
    # answers of one length, for which the two metrics are the same, but for BoolQ's true and false
    "commonsense_boolq": Task("BoolQ", 3270, EITHER),
    "commonsense_piqa": Task("PIQA", 1838),
    "commonsense_siqa": Task("SIQA", 1954),
    "commonsense_hellaswag": Task("HellaSwag", 10042),
    "commonsense_winogrande": Task("WinoGrande", 1267),
    "commonsense_arc_easy": Task("ARC-e", 2376),
    "commonsense_arc_challenge": Task("ARC-c", 1172),
    "commonsense_openbookqa": Task("OpenBookQA", 500),
}


@dataclass(frozen=True)
class Suite:
    """Tasks of lm-eval, each with the number of solved examples before a question."""

    name: str
    title: str
    shots: Mapping[str, int]


LLM360 = {"arc_challenge": 25, "hellaswag": 10, "mmlu": 5, "truthfulqa_mc2": 0, "winogrande": 5}
OPENLLM = LLM360 | {"crows_pairs_english": 25, "piqa": 0, "race": 0}
ZERO_SHOT = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "piqa", "sciq", "winogrande")
COMMONSENSE = [task for task in TASKS if task.startswith("commonsense_")]

SUITES: Mapping[str, Suite] = {
    suite.name: suite
    for suite in (
        Suite("zero-shot", "Zero-Shot", dict.fromkeys(ZERO_SHOT, 0)),
        Suite("openllm", "OpenLLM Leaderboard", dict(sorted(OPENLLM.items()))),
        Suite("llm360", "LLM360", LLM360),
        Suite("commonsense", "Commonsense", dict.fromkeys(COMMONSENSE, 0)),
    )
}


@cache
def published() -> dict[str, Any]:
    """Return the content of `published.json`: the tables, their source, protocol and notes."""
    from importlib.resources import files

    found = files("openelm_mlx.evaluate").joinpath("published.json")
    content: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    return content


def figures(suite: str, row: str | None) -> dict[str, float]:
    """Return Apple's figures in per cent, by task and for `AVERAGE`, or none if there are none."""
    found: dict[str, float] = published()["tables"][suite]["rows"].get(row, {})
    return dict(found)


def source_of(row: str) -> dict[str, str]:
    """Return what the figures of a row are taken from, and where that is."""
    tables = published()["tables"].values()
    own = [table["source"] for table in tables if row in table["rows"] and "source" in table]
    found: dict[str, str] = own[0] if own else published()["source"]
    return found


def row_of(name: str) -> str | None:
    """Return the row of the tables that a model of this name has, or None.

    It is a name of the hub or of CoreNet's catalog, also one with bits at its end.

    >>> row_of("450m-instruct"), row_of("apple/OpenELM-1_1B"), row_of("corenet-mlx:3b-4bit")
    ('OpenELM-450M-Instruct', 'OpenELM-1_1B', 'OpenELM-3B')
    >>> row_of("corenet:270m-lora"), row_of("corenet:270m@100k"), row_of("openelm-tiny")
    ('OpenELM-270M-LoRA', None, None)
    """
    catalog = re.fullmatch(r"corenet(?:-mlx)?:(.*?)(-lora)?", name.lower())
    last, tuned = catalog.groups() if catalog else (name.lower().rsplit("/", 1)[-1], None)
    if (found := NAME.fullmatch(last)) is None:
        return None
    size = found[1].upper().replace(".", "_")
    row = f"OpenELM-{size}{'-Instruct' if found[2] else ''}{LORA if tuned else ''}"
    return row if any(row in table["rows"] for table in published()["tables"].values()) else None
