"""One run of one engine: what the harness needs to know of it, whoever the engine is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Timed:
    """A generation, token by token.

    `tokens` are greedy, of the first sequence when the batch holds several. `seconds[i]` is when
    token i was known on the host, counted from handing over the prompt, so `seconds[0]` is the time
    to the first token.
    """

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]
    peak_memory_bytes: int | None = None

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.seconds[0]

    @property
    def decoding(self) -> float:
        """Seconds from the first token to the last: `len(tokens) - 1` steps."""
        return self.seconds[-1] - self.seconds[0]

    def prefill_rate(self, prompt_tokens: int, batch_size: int = 1) -> float:
        """Prompt tokens a second; the first token comes out of the prompt's pass, so its time
        belongs to the prompt.
        """
        return batch_size * prompt_tokens / self.first

    def decode_rate(self, batch_size: int = 1) -> float | None:
        """Tokens a second after the first, over all sequences; None for a single token, which has
        no step to time.
        """
        steps = len(self.tokens) - 1
        return batch_size * steps / self.decoding if steps and self.decoding > 0 else None


class Session(Protocol):
    """An engine with a model loaded, ready to be timed."""

    engine: str  # "openelm-mlx", "mlx-lm", "llama.cpp", "torch"
    version: str
    load_seconds: float

    def generate(self, prompt: list[int], tokens: int) -> Timed:
        """Exactly `tokens` greedy tokens after `prompt` (ids, at least one), the end of text
        ignored; nothing reused.
        """
        ...

    def close(self) -> None:
        """Free the model. The session is of no use afterwards."""
        ...
