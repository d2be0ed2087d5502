"""The loop of a run: its steps, its evaluations, its checkpoints."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

from openelm_mlx import __version__
from openelm_mlx.device import mx, utils
from openelm_mlx.engine.loading import Engine
from openelm_mlx.engine.memory import give_back, wired
from openelm_mlx.engine.ranks import Ranks, check_alike
from openelm_mlx.engine.threads import device_work
from openelm_mlx.finetune import logs, preference, recipes, state
from openelm_mlx.finetune.batches import Shape
from openelm_mlx.finetune.data import Data
from openelm_mlx.finetune.examples import row_length
from openelm_mlx.finetune.memory import fitted
from openelm_mlx.finetune.optimizer import rate_at, warmup_steps
from openelm_mlx.finetune.options import FinetuneOptions
from openelm_mlx.finetune.plan import Plan, once, sized
from openelm_mlx.finetune.preference import loss_of
from openelm_mlx.finetune.records import PAIRS
from openelm_mlx.finetune.report import FinetuneReport, settings
from openelm_mlx.finetune.result import NotFiniteError, failed, finished
from openelm_mlx.finetune.state import BEST, STATE, Metrics, Standing
from openelm_mlx.finetune.step import Loss, Step
from openelm_mlx.finetune.trainable import base_of, digest, hash_of, rounding, trainable
from openelm_mlx.model.fingerprint import fingerprint_of
from openelm_mlx.stopping import StopKey

Progress = Callable[[dict[str, Any], int], None]  # a row of metrics.jsonl, and how many steps

FREE = ("save_every", "log", "validation")  # options that change no number; data have a hash
EVALUATIONS = 10  # of a run, if no number of steps is given


class Run:
    """A run: what is trained, on what, and where it is."""

    def __init__(
        self,
        engine: Engine,
        data: Data,
        folder: Path,
        options: FinetuneOptions,
        ranks: Ranks,
        resumed: bool,
    ) -> None:
        self.engine, self.begun = base_of(engine), engine.adapter
        self.data, self.folder = data, folder
        self.ranks, self.resumed, self.standing = ranks, resumed, Standing()
        options = options.settled(data.kind == PAIRS)
        length = row_length(engine, options)
        options, self.length = sized(data.train, data.validation, options, length)
        self.fingerprint = fingerprint_of(self.engine.model)
        asked = {name: value for name, value in settings(options).items() if name not in FREE}
        self.identity: dict[str, Any] = {
            "version": __version__,
            "weights": self.fingerprint,
            "adapter": engine.adapter and digest(engine.adapter),
            "data": data.sha256,
            "processes": ranks.size,
            "options": {**asked, "length": self.length},
        }
        check_alike([json.loads(one) for one in ranks.gather(json.dumps(self.identity))])
        arrays, self.fit = self.opened()
        self.model = trainable(engine, options)
        # before a checkpoint gives the model other weights: a reference has those of the beginning
        loss = loss_of(engine, self.model, options, data.train)
        self.fit = self.fit or self.fitting(options, loss)
        self.options = replace(options, batch=self.fit["batch"], accumulate=self.fit["accumulate"])
        self.plan = Plan(data.train, self.options, self.length, ranks)
        self.held_out = (
            once(data.validation, self.options, self.length, ranks) if data.validation else None
        )
        self.steps = self.plan.steps
        warmup_steps(self.options, self.steps)  # refuses what the first step would
        self.every = options.evaluate_every or math.ceil(self.steps / EVALUATIONS)
        self.step = Step(self.model, self.options, loss)
        if self.resumed:
            self.restore(arrays)
        self.stopping, self.saved = False, self.resumed
        self.takers: list[Callable[[dict[str, Any]], None]] = []  # of each row

    def opened(self) -> tuple[dict[str, mx.array], dict[str, Any]]:
        """Read the checkpoint, in the first process; the others get what it says. Return its
        arrays, and the batches that the run has had.
        """
        arrays: dict[str, mx.array] = {}
        about = None
        if self.resumed:
            arrays, about = state.read_state(self.folder)
            state.check_same(self.folder, about["identity"], self.identity)
        about = json.loads(self.ranks.gather(json.dumps(about))[0])
        if about is None:
            return arrays, {}
        self.resumed, self.standing = True, state.standing_of(self.folder, about)
        return arrays, about["fit"]

    def fitting(self, options: FinetuneOptions, loss: Loss) -> dict[str, Any]:
        """Return the batches that fit into the memory of every process, and what they take.

        Raises `FinetuneError` if none does.
        """

        def shapes(some: FinetuneOptions) -> list[Shape]:
            return Plan(self.data.train, some, self.length, self.ranks).shapes

        copied = options.method == "full" and self.data.kind == PAIRS  # what DPO refers to
        kept = sum(array.nbytes for array in self.weights.values()) if copied else 0
        found = fitted(lambda some: Step(self.model, some, loss), options, shapes, kept=kept)
        fit: dict[str, Any] = {"batch": found.options.batch, "accumulate": found.options.accumulate}
        fit |= {"notice": found.notice, "predicted": found.predicted.as_dict()}
        given: list[dict[str, Any]] = [
            json.loads(one) for one in self.ranks.gather(json.dumps(fit))
        ]
        return min(given, key=lambda one: one["batch"])

    def restore(self, arrays: dict[str, mx.array]) -> None:
        own = state.stored(self.model, self.step.optimizer)
        if self.ranks.rank == 0:
            state.check_tensors(own, arrays)
            own = {name: arrays[name] for name in own}
        found = self.ranks.firsts(list(own.values()))
        state.restore(self.model, self.step.optimizer, dict(zip(own, found, strict=True)))

    @device_work
    def whole(self, progress: Progress, stop: StopKey) -> FinetuneReport:
        """Run to the end. Raises what `finetune` raises."""
        self.tell, self.stop = progress, stop
        mx.reset_peak_memory()
        with ExitStack() as stack:
            stack.callback(wired.release, self)
            wired.hold_bytes(self, {id(self): self.fit["predicted"]["total"]})
            if self.ranks.rank == 0:
                with state.writing(self.folder):
                    self.open(stack)
            try:
                return finished(self, self.loop())
            except NotFiniteError as error:
                raise failed(self, error) from None

    def open(self, stack: ExitStack) -> None:
        """Open what the run writes, in the first process: from now on a kill loses nothing."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(state.claimed(self.folder))
        state.goes_on(self.folder, self.resumed)  # another process may have ended a run meanwhile
        state.remove_leftovers(self.folder)
        self.save()
        metrics = Metrics(self.folder, self.standing, self.resumed)
        stack.callback(metrics.close)
        about, after = settings(self.options), self.standing.step
        log = stack.enter_context(logs.opened(self.options.log, self.folder, about, after))
        self.takers = [metrics.add, log]

    def loop(self) -> str:
        """Train and evaluate until there is a reason to end, and return it."""
        at = self.standing
        while True:
            if self.held_out is not None and self.is_due():
                self.evaluate(self.held_out)
            patience = self.options.patience
            if patience is not None and at.worse >= patience:
                return f"no better validation loss in {patience} evaluations"
            if at.step == self.steps:
                return "all steps are done"
            if at.step % self.options.save_every == 0:
                self.save()
            self.train()

    def is_due(self) -> bool:
        """Return whether the step that is done is one to evaluate, and has not been."""
        step = self.standing.step
        return self.standing.evaluated < step and step in (
            self.steps,
            step // self.every * self.every,
        )

    def train(self) -> None:
        """Take the next step, and write its row."""
        began, at = time.perf_counter(), self.standing
        number = at.step + 1
        rate = rate_at(self.options, number, self.steps)
        (total, count, trained, *more), names, grads = self.gradients(number)
        count = mx.maximum(count, 1)
        # with a norm that is not finite nothing is updated
        norm = self.step.update(grads, mx.where(mx.isfinite(total), count, mx.nan), rate)
        del grads
        mx.eval(norm, self.model.trainable_parameters(), self.step.optimizer.state)
        give_back(self.fit["predicted"]["total"])  # what batches of other lengths have left
        share, length = 1 / number_in(count), number_in(norm)
        loss = number_in(total) * share
        for name, value in (("loss", loss), ("norm of the gradients", length)):
            if not math.isfinite(value):
                raise NotFiniteError(f"step {number}: the {name} is {value}", number)
        seconds, tokens = time.perf_counter() - began, self.plan.tokens(number)
        at.step, at.last_loss, self.saved = number, loss, False
        at.first_loss = loss if at.first_loss is None else at.first_loss
        at.tokens, at.seconds = at.tokens + tokens, at.seconds + seconds
        at.trained_tokens += int(number_in(trained))
        at.peak_bytes = max(at.peak_bytes, mx.get_peak_memory())
        row = {"step": number, "epoch": self.plan.epoch(number), "loss": loss}
        row |= {name: number_in(one) * share for name, one in zip(names, more, strict=True)}
        row |= {"learning_rate": rate, "gradient_norm": length, "tokens": tokens}
        row |= {"trained_tokens": int(number_in(trained)), "seconds": seconds}
        self.write({**row, "tokens_per_second": tokens / seconds, "peak_bytes": at.peak_bytes})

    def gradients(self, number: int) -> tuple[list[mx.array], list[str], Any]:
        """Return the sums over the step's batches, in all processes: of the losses, of what they
        are of, of the trained tokens, and those of the names; then the gradients.
        """
        trained, found = mx.array(0.0), None
        for place, batch in enumerate(self.plan.batches(number)):
            unique = place * self.ranks.size + self.ranks.rank
            key = mx.random.key(hash_of(self.options.seed, "step", number, unique))
            found = self.step.gradients(batch, key, found)
            trained = trained + batch.weights.sum()
            mx.eval(found, trained)
        sums, grads = cast(Any, found)  # a step has a batch for each process, be it empty
        numbers, names = [sums.total, sums.count, trained, *sums.extra.values()], list(sums.extra)
        if self.ranks.size > 1:
            pairs: Any = utils.tree_flatten(grads)
            paths, arrays = zip(*pairs, strict=True)
            del found, grads, pairs
            grads = utils.tree_unflatten(list(zip(paths, self.ranks.sums(arrays), strict=True)))
            del arrays
            asked = mx.array(float(self.stop.asked))
            *numbers, asked = self.ranks.sums([mx.stack([*numbers, asked])])[0]
            self.stopping = number_in(asked) > 0
        return numbers, names, grads

    def evaluate(self, plan: Plan) -> None:
        """Compute the loss on the held-out data, and keep the weights if it is the best."""
        began, at, found = time.perf_counter(), self.standing, dict[str, float]()
        for number in range(1, plan.steps + 1):
            for batch in plan.batches(number):
                sums = self.step.evaluate(batch)
                mx.eval(sums)
                named = {"loss": sums.total, "count": sums.count, **sums.extra}
                found = {name: found.get(name, 0.0) + number_in(one) for name, one in named.items()}
            if self.ranks.size == 1 and self.stop.asked:
                self.interrupt()
        given = [json.loads(one) for one in self.ranks.gather(json.dumps(found))]
        totals = {name: sum(one[name] for one in given) for name in found}
        count = max(totals.pop("count"), 1)
        means = {f"validation_{name}": total / count for name, total in totals.items()}
        loss = means["validation_loss"]
        if not math.isfinite(loss):
            raise NotFiniteError(f"step {at.step}: the validation loss is {loss}")
        best = at.best_loss is None or loss < at.best_loss
        at.evaluated, at.last_validation_loss, self.saved = at.step, loss, False
        at.worse = 0 if best else at.worse + 1
        if at.first_validation_loss is None:
            at.first_validation_loss = loss
        if best:
            at.best_step, at.best_loss = at.step, loss
            if self.ranks.rank == 0:
                state.write_arrays(self.folder / BEST, self.weights, {"step": at.step})
        at.seconds += time.perf_counter() - began
        self.write({"step": at.step, **means, "best": best})

    def write(self, row: dict[str, Any]) -> None:
        """Write a row, and tell it. Ctrl-C is met here: a step is done, or an evaluation."""
        with state.writing(self.folder):
            for take in self.takers:
                take(row)
        try:
            self.tell(row, self.steps)
        except KeyboardInterrupt:
            self.stop.asked = True
        if self.stopping or (self.ranks.size == 1 and self.stop.asked):
            self.interrupt()

    def interrupt(self) -> None:
        """Save, and raise `KeyboardInterrupt`."""
        self.stop.over = True
        self.save()
        self.ranks.gather("saved")  # mlx.launch kills the others when one ends
        raise KeyboardInterrupt

    def save(self) -> None:
        """Write the checkpoint, unless it is there."""
        if self.ranks.rank == 0 and not self.saved:
            arrays = state.stored(self.model, self.step.optimizer)
            about = {"standing": asdict(self.standing), "identity": self.identity, "fit": self.fit}
            state.write_arrays(self.folder / STATE, arrays, about)
            self.saved = True

    @property
    def notices(self) -> tuple[str, ...]:
        """Sentences on what a user may not expect, to be said before the first step."""
        said = [recipes.note(self.options.recipe, self.engine.config)]
        if self.data.kind == PAIRS:
            said.append(preference.note(self.engine, self.options))
        if self.begun is not None:
            said.append(f"The adapter {self.begun.name} is trained further.")
        asked, done = self.options.accumulate, self.plan.accumulate
        if done < asked:
            what = f"An epoch has fewer batches than the {asked} of accumulate"
            said.append(f"{what}, so a step takes {done}.")
        said += [rounding(self.model), self.fit["notice"], *self.data.notices]
        return tuple(filter(None, said))

    @property
    def weights(self) -> dict[str, mx.array]:
        """The trained weights, by their names in a checkpoint."""
        return state.leaves(self.model.trainable_parameters(), state.WEIGHTS)


def number_in(array: mx.array) -> float:
    found: Any = array.item()
    return float(found)
