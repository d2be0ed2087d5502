"""The models that a server has: a name becomes a loaded model, with the batch of its requests."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

from openelm_mlx.engine.loading import Engine, load
from openelm_mlx.engine.options import EngineOptions, ModelOptions
from openelm_mlx.engine.prompt_cache import PromptCache
from openelm_mlx.engine.scheduler import BatchEngine
from openelm_mlx.errors import BusyError
from openelm_mlx.server.errors import ApiError
from openelm_mlx.server.options import ServerOptions
from openelm_mlx.server.worker import Worker


@dataclass(eq=False)
class Model:
    """A loaded model; all its requests run in one batch."""

    name: str
    engine: Engine
    batch: BatchEngine
    most: int  # requests that may run and wait
    created: int = field(default_factory=lambda: int(time.time()))

    def check_room(self, worker: Worker, count: int = 1) -> None:
        """Raise `BusyError` if `count` more cannot wait, `ApiError` if they never could."""
        if count > self.most:
            what = f"the body asks for {count} answers; {self.most} may run and wait here"
            raise ApiError(400, f"{what}. Lower n, or send fewer prompts at once")
        load = worker.load(self.batch)
        if load + count > self.most:
            what = f"{load} requests run or wait, and no more than {self.most} may"
            raise BusyError(f"{what}; ask again a little later")


class Models:
    """The models of a server, by name."""

    def __init__(
        self,
        names: Sequence[str],
        options: ServerOptions,
        loading: ModelOptions,
        running: EngineOptions,
    ) -> None:
        self.names, self._options, self._loading = tuple(names), options, loading
        self._running = running
        self.loaded: dict[str, Model] = {}
        self.cache = PromptCache(options.cache_mb * 2**20)

    @property
    def ready(self) -> bool:
        """True if every model has been loaded."""
        return len(self.loaded) == len(self.names)

    async def load(self, worker: Worker) -> None:
        """Load all models, on the device's thread."""
        for name in self.names:
            self.loaded[name] = await worker.call(partial(self._load, name))

    def _load(self, name: str) -> Model:
        options = self._options
        engine = load(name, **asdict(self._loading))
        most = options.queue + options.slots
        shared: Any = {"prompt_cache": self.cache, "max_waiting": most}
        batch = BatchEngine(engine, options.slots, self._running, **shared)
        return Model(name, engine, batch, most)

    def find(self, name: str | None) -> Model:
        """Return a model by its name, the first one for None. Raises `ApiError`."""
        name = self.names[0] if name is None else name
        if name in self.loaded:
            return self.loaded[name]
        if name in self.names:
            raise ApiError(503, f"{name} is being loaded; try again in a few seconds")
        known = ", ".join(self.names)
        what = f"the model {name!r} is not served here; there is {known}"
        raise ApiError(404, what, param="model", code="model_not_found")
