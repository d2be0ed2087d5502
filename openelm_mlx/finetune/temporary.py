"""Stands in for what is not there yet."""

from __future__ import annotations

import math
import random
from typing import Any

from openelm_mlx.finetune.batches import packed


class Plan:
    def __init__(
        self, examples: Any, options: Any, length: int, ranks: Any, once: bool = False
    ) -> None:
        self.examples_, self.options, self.length, self.ranks = examples, options, length, ranks
        self.per = (
            math.ceil(math.ceil(len(examples) / options.batch) / (options.accumulate * ranks.size))
            if examples
            else 0
        )
        self.steps = self.per if once else options.steps or math.ceil(self.per * options.epochs)

    def groups(self, step: int) -> Any:
        epoch, number = divmod(step - 1, self.per)
        order = list(range(len(self.examples_)))
        random.Random(f"{self.options.seed} {epoch}").shuffle(order)
        b = self.options.batch
        groups = [order[i : i + b] for i in range(0, len(order), b)]
        n = self.options.accumulate * self.ranks.size
        return [[self.examples_[i] for i in g] for g in groups[number * n : number * n + n]]

    def batches(self, step: int) -> Any:
        own = self.groups(step)[self.ranks.rank :: self.ranks.size]
        return [packed([[e] for e in g], self.options.batch, self.length, 64) for g in own]

    def examples(self, step: int) -> Any:
        return [e for g in self.groups(step) for e in g]

    def epoch(self, step: int) -> Any:
        return step / self.per
