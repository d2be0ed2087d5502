"""How likely a model finds given texts: one pass for many of them, nothing drawn."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from openelm_mlx.device import mx
from openelm_mlx.engine.options import check_loaded
from openelm_mlx.engine.prompts import prompt_tokens
from openelm_mlx.engine.threads import device_work
from openelm_mlx.errors import PromptError
from openelm_mlx.fields import check_count

if TYPE_CHECKING:
    from openelm_mlx.engine.loading import Engine

LOGITS_ROWS = 256  # positions whose logits exist at one time: 33 MB for 32,000 ids


def score(
    engine: Engine, sequences: Sequence[Sequence[int]], *, batch_tokens: int = 4096
) -> list[list[float]]:
    """Return, for each sequence, the log probability (natural) of every token after its first.

    >>> score(engine, [engine.tokenizer.encode("Once upon a time")])
    [[-2.1, -0.3, ...]]

    Each is that of the model itself, given all tokens before: what `logprobs` reports of a drawn
    token. An id that is never drawn has -inf. One pass of the model takes sequences of similar
    length, at most `batch_tokens` with their padding, or one that is longer; how they are put
    together changes the numbers by rounding only. Raises `PromptError` for an empty sequence, one
    beyond the model's context and what is no token id, before any work.
    """
    check_loaded("engine", engine)
    check_count("batch_tokens", batch_tokens, 1)
    if isinstance(sequences, (str, bytes)):
        raise PromptError("sequences is one text; give a list, also for a single one: [text]")
    checked = []
    for number, sequence in enumerate(sequences, 1):
        try:
            checked.append(prompt_tokens(engine, sequence))
        except PromptError as error:
            raise PromptError(f"sequence {number}: {error}") from None
    scores: list[list[float]] = [[] for _ in checked]
    for batch in batches([len(tokens) - 1 for tokens in checked], batch_tokens):
        for number, row in zip(
            batch, score_batch(engine, [checked[n] for n in batch]), strict=True
        ):
            scores[number] = row
    return scores


def batches(lengths: list[int], tokens: int) -> Iterator[list[int]]:
    """Yield the numbers of sequences that share a pass, the longest first; of length 0 none is
    run.
    """
    order = sorted((n for n, length in enumerate(lengths) if length), key=lambda n: -lengths[n])
    while order:
        count = max(1, tokens // lengths[order[0]])
        yield order[:count]
        del order[:count]


@device_work
def score_batch(engine: Engine, rows: list[list[int]]) -> list[list[float]]:
    """Score sequences of two tokens or more in one pass, padded at the end, where none looks."""
    lengths = [len(row) - 1 for row in rows]
    width = max(lengths)
    fed = mx.array([row[:-1] + [0] * (width + 1 - len(row)) for row in rows])
    hidden = engine.model.hidden(fed).reshape(len(rows) * width, -1)
    places = mx.array([n * width + i for n, length in enumerate(lengths) for i in range(length)])
    targets = mx.array([token for row in rows for token in row[1:]])
    found: list[float] = []
    for start in range(0, targets.size, LOGITS_ROWS):
        part = slice(start, start + LOGITS_ROWS)
        logits = engine.model.logits(hidden[places[part]])[:, : engine.vocab].astype(mx.float32)
        chosen = mx.take_along_axis(logits, mx.minimum(targets[part], engine.vocab - 1)[:, None], 1)
        logp = chosen[:, 0] - mx.logsumexp(logits, axis=-1)
        found += mx.where(targets[part] < engine.vocab, logp, -mx.inf).tolist()  # type: ignore[arg-type]
    rest = iter(found)
    return [[next(rest) for _ in range(length)] for length in lengths]
