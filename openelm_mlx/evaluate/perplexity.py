"""Perplexity of texts that a model reads in windows, and confidence intervals of such means."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openelm_mlx.device import mx
from openelm_mlx.engine.options import check_loaded
from openelm_mlx.engine.ranks import Ranks
from openelm_mlx.errors import CheckpointError, OptionError, PromptError
from openelm_mlx.evaluate.options import TextOptions
from openelm_mlx.evaluate.plan import Request
from openelm_mlx.evaluate.run import Progress, answers
from openelm_mlx.evaluate.score import Answer, perplexity_of
from openelm_mlx.model.config import BOS

if TYPE_CHECKING:
    import numpy as np

    from openelm_mlx.engine.loading import Engine
    from openelm_mlx.evaluate.store import Store

TEXT = Path(__file__).parents[1] / "assets" / "verification" / "text.txt"  # if none is given
TEXT_NAME = "eight paragraphs of Darwin's Origin of Species (1859)"
ROW = 512  # tokens of a window, BOS included, unless asked otherwise
BLOCK, FEWEST_BLOCKS, RESAMPLES = 128, 8, 1000  # of the intervals: see `resampled`


@dataclass(frozen=True)
class Perplexity:
    """How well a model predicts texts: every token, after BOS and the tokens of its window.

    `nats_per_token` is the mean negative log probability, `perplexity` its exponential, and
    `bits_per_byte` the sum in bits, divided by the bytes of the texts in UTF-8. `intervals_95` has
    the 95 % confidence interval of a figure by its name, or nothing for a text too short for one.
    """

    tokens: int
    bytes: int
    windows: int
    nats_per_token: float
    perplexity: float
    bits_per_byte: float
    intervals_95: Mapping[str, tuple[float, float]] = field(default_factory=dict)


def text_perplexity(
    engine: Engine,
    texts: Sequence[str],
    options: TextOptions | None = None,
    *,
    store: Store | None = None,
    ranks: Ranks | None = None,
    progress: Progress | None = None,
) -> Perplexity:
    """Return the perplexity of texts, of which each begins a window of its own.

    >>> text_perplexity(engine, [Path("story.txt").read_text()], TextOptions(stride=256))
    Perplexity(tokens=2806, bytes=9899, windows=10, nats_per_token=...)

    `store`, `ranks` and `progress` are those of `answers`. Raises `PromptError` for an empty text,
    `OptionError` for windows that the model cannot read, and `CheckpointError` if its numbers
    overflow.
    """
    options = TextOptions() if options is None else options
    check_loaded("engine", engine)
    context, stride = window(options, engine)
    encoded, bos = encode(engine, texts), engine.tokenizer.bos_id
    asked = [list(requests_of(ids, context, stride, bos)) for ids in encoded]
    flat = [request for own in asked for request in own]
    how: Any = {"store": store, "ranks": ranks, "progress": progress}
    found = iter(answers(engine, flat, batch_tokens=options.batch_tokens, **how))
    parts = []
    for own, text in zip(asked, texts, strict=True):
        parts += blocks(engine, zip(own, found, strict=False), len(text.encode()))
    nats, tokens = math.fsum(part[0] for part in parts), sum(map(len, encoded))
    size = sum(len(text.encode()) for text in texts)
    check_finite(engine.name, perplexity_of(nats / tokens))
    return Perplexity(
        tokens=tokens,
        bytes=size,
        windows=sum(1 + math.ceil(max(0, len(ids) + 1 - context) / stride) for ids in encoded),
        nats_per_token=nats / tokens,
        perplexity=perplexity_of(nats / tokens),
        bits_per_byte=nats / math.log(2) / size,
        intervals_95=intervals_of(parts),
    )


def window(options: TextOptions, *engines: Engine) -> tuple[int, int]:
    """Return the tokens of a window, BOS included, and the tokens from one to the next.

    Raises `OptionError` for windows that a model cannot read, or that would leave tokens out.
    """
    most, name = min((engine.config.max_context_length, engine.name) for engine in engines)
    if most < 2:
        raise OptionError(f"{name} has a context of {most} token, so it predicts none after BOS")
    context = min(ROW, most) if options.context is None else options.context
    if context > most:
        what = f"context is {context}, but {name} has a context of {most} tokens"
        raise OptionError(f"{what}; allowed is a whole number from 2 to {most}")
    stride = context - 1 if options.stride is None else options.stride
    if stride >= context:
        what = f"stride is {stride}, but a window of {context} tokens has {context - 1} after BOS"
        raise OptionError(f"{what}; allowed is a whole number from 1 to {context - 1}")
    return context, stride


def encode(engine: Engine, texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts, without BOS. Raises `PromptError` for a text without any."""
    if isinstance(texts, (str, bytes)):
        raise PromptError("texts is one text; give a list, also for a single one: [text]")
    encoded = [engine.tokenizer.encode(text, bos=False) for text in texts]
    for number, ids in enumerate(encoded, 1):
        if not ids:
            raise PromptError(f"text {number} is empty; give at least one character")
    if not encoded:
        raise PromptError("there is no text; give at least one")
    return encoded


def requests_of(ids: Sequence[int], context: int, stride: int, bos: int = BOS) -> Iterator[Request]:
    """Yield requests for the log-likelihood of every token once, in order, of some `BLOCK` tokens.

        ids            a b c d e f g       context 4, stride 2
        windows    BOS a b c               all tokens are scored
                       BOS c d e           the last two: d and e
                           BOS e f g       the last two: f and g

    A token has at least `context - stride` tokens before it, or all of the text. With a stride of
    `context - 1` windows do not overlap.
    """
    done = 0
    for start in count(0, stride):
        end = min(start + context - 1, len(ids))
        row, first = (bos, *ids[start:end]), done - start + 1
        for low, high in pairwise([*block_starts(end - done + 1), end - done]):
            yield Request(row[: first + low], row[first + low : first + high])
        done = end
        if end == len(ids):
            return


def text_batches(ids: list[int], length: int, rows: int = 4, bos: int = BOS) -> list[mx.array]:
    """Return all tokens in consecutive windows, each after BOS: full ones in batches, of ids
    [rows, length], the shorter last one by itself.
    """
    step = length - 1
    cut = [[bos, *ids[start : start + step]] for start in range(0, len(ids), step)]
    full = [row for row in cut if len(row) == length]
    batches = [full[start : start + rows] for start in range(0, len(full), rows)]
    batches += [[row] for row in cut[len(full) :]]
    return [mx.array(batch, dtype=mx.int32) for batch in batches]


def check_finite(name: str, figure: float) -> None:
    """Raise `CheckpointError` if a model's perplexity is no number that JSON has."""
    if not math.isfinite(figure):
        raise CheckpointError(
            f"{name} computes numbers that overflow, so its predictions cannot be measured: these "
            "are no trained weights, or float16 is too narrow for them; try --dtype float32"
        )


def blocks(
    engine: Engine, answered: Iterable[tuple[Request, Answer]], whole: int
) -> list[np.ndarray]:
    """Return nats, bytes and tokens [3] of the blocks of a text: a request each, or several where a
    short stride makes them short. The text has `whole` bytes.
    """
    import numpy as np

    found: list[np.ndarray] = []
    for (_, tokens), answer in answered:
        size = sum(len(engine.tokenizer.piece_bytes(token)) for token in tokens)
        part = np.array([-answer.logprob, size, len(tokens)])
        if found and found[-1][2] <= BLOCK // 2:
            found[-1] += part
        else:
            found.append(part)
    found[0][1] += whole - sum(part[1] for part in found)  # the first token has a space of its own
    return found


def block_starts(length: int) -> list[int]:
    """Return where the blocks of so many positions begin: `BLOCK` positions each, about."""
    import numpy as np

    blocks = max(1, round(length / BLOCK))
    return [int(start) for start in np.linspace(0, length, blocks, endpoint=False)]


def resampled(total: np.ndarray, size: np.ndarray) -> np.ndarray | None:
    """Return `RESAMPLES` draws [draws, figures] of means over text, from the sums of figures over
    the blocks of a text, and the number of terms in each [figures, blocks].

    Neighbouring positions are alike, so blocks of some `BLOCK` positions are drawn, not positions:
    the bootstrap of H. R. Kuensch, "The jackknife and the bootstrap for general stationary
    observations", Annals of Statistics 17 (1989), with blocks that neither overlap nor span two
    rows. The draws are the same on every run; an interval is between the 2.5th and the 97.5th
    percentile of them. It speaks of the kind of text that was read, not of others. Fewer than
    `FEWEST_BLOCKS` blocks give None.
    """
    import numpy as np

    blocks = total.shape[1]
    if blocks < FEWEST_BLOCKS:
        return None
    random = np.random.RandomState(0)  # NumPy keeps this generator's numbers for good
    draws = (random.randint(blocks, size=blocks) for _ in range(RESAMPLES))
    return np.array([total[:, drawn].sum(axis=1) / size[:, drawn].sum(axis=1) for drawn in draws])


def interval(draws: np.ndarray) -> tuple[float, float]:
    """Return the 95 % confidence interval of a figure, given its draws."""
    import numpy as np

    low, high = np.quantile(draws, (0.025, 0.975)).tolist()
    return low, high


def intervals_of(parts: Sequence[np.ndarray]) -> dict[str, tuple[float, float]]:
    """Return the intervals of a perplexity, given the nats, bytes and tokens of blocks."""
    import numpy as np

    nats, size, tokens = np.array(parts).T
    draws = resampled(np.array([nats, size]), np.array([tokens, tokens]))
    if draws is None:
        return {}
    nats, size = draws.T
    low, high = interval(nats)
    return {
        "nats_per_token": (low, high),
        "perplexity": (perplexity_of(low), perplexity_of(high)),
        "bits_per_byte": interval(nats / size / math.log(2)),
    }
