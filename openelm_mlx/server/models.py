"""The models that a server has: a name becomes a loaded model, with the batch of its requests.

As many models as fit into the budget of memory are loaded at the start. Another one is loaded when
it is asked for; then the least recently used ones that nobody uses make room.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from openelm_mlx.device import mx, recommended_bytes
from openelm_mlx.engine.draft_model import ModelDraft
from openelm_mlx.engine.hub import Resolved, resolve_model
from openelm_mlx.engine.loading import Engine, load, load_resolved, loaded_bytes, speaks_instruct
from openelm_mlx.engine.options import EngineOptions, ModelOptions
from openelm_mlx.engine.prompt_cache import PromptCache
from openelm_mlx.engine.scheduler import BatchEngine
from openelm_mlx.errors import BusyError, OpenELMError, OptionError
from openelm_mlx.fields import shown
from openelm_mlx.model.cache import KVCache
from openelm_mlx.model.checkpoint import read_headers
from openelm_mlx.server.errors import RETRY, ApiError
from openelm_mlx.server.options import ServerOptions
from openelm_mlx.server.worker import Worker

log = logging.getLogger("openelm.serve")


@dataclass(eq=False)
class Model:
    """A loaded model; all its requests run in one batch."""

    name: str
    engine: Engine
    batch: BatchEngine
    most: int  # requests that may run and wait
    used: float = 0.0  # seconds of the monotonic clock

    def check_room(self, worker: Worker, count: int = 1) -> None:
        """Raise `BusyError` if `count` more cannot wait, `ApiError` if they never could."""
        if count > self.most:
            what = f"the body asks for {count} answers; {self.most} may run and wait here"
            raise ApiError(400, f"{what}. Lower n, or send fewer prompts at once")
        load = worker.load(self.batch)
        if load + count > self.most:
            what = f"{load} requests run or wait, and no more than {self.most} may"
            raise BusyError(f"{what}; ask again a little later")


@dataclass
class Source:
    """Facts about a model that are known before it is loaded."""

    resolved: Resolved
    nbytes: int  # of the weights; of the adapters too, once it has been loaded
    context: int
    instruct: bool


class SharedCache(PromptCache):
    """The prefix cache of all models: it gives way to weights and to running requests.

    `room` returns the bytes that are left for it. With `most` 0 it keeps nothing.
    """

    def __init__(self, most: int, room: Callable[[], int]) -> None:
        super().__init__(most)
        self.most, self.room = most, room

    def put(self, weights: object, tokens: Sequence[int], cache: KVCache, owner: str = "") -> None:
        if self.most:
            self.max_bytes = max(0, min(self.most, self.room()))
            super().put(weights, tokens, cache, owner)


@dataclass(frozen=True)
class Served:
    """A name that requests may give."""

    name: str
    base: str  # of the model
    adapter: str | None = None
    folder: Path | None = None  # of the adapter


def served_names(names: Sequence[str], adapters: Sequence[str]) -> dict[str, Served]:
    """Return what is served, by name: each model, and MODEL:NAME for each adapter.

    `adapters` are [MODEL:][NAME=]FOLDER. Raises `OptionError`.
    """
    served = {name: Served(name, name) for name in names}
    for given in adapters:
        left, _, right = given.rpartition("=")
        bare = Path(given).expanduser().exists()  # a folder may have = in its name
        label, folder = ("", given) if bare else (left, right)
        base = next((name for name in names if label.startswith(f"{name}:")), None)
        name = label if base is None else label[len(base) + 1 :]
        if base is None and len(names) > 1:
            what = f"adapter is {given!r}, and there are {len(names)} models"
            raise OptionError(f"{what}; say whose it is, as in {names[0]}:NAME=FOLDER")
        path, base = Path(folder).expanduser(), base or names[0]
        name = name or path.absolute().name
        whole = f"{base}:{name}"
        if whole in served:
            raise OptionError(f"two adapters are called {whole}; give one another name")
        if not path.exists():
            raise OptionError(f"adapter is {given!r}; there is no folder {folder}")
        served[whole] = Served(whole, base, name, path)
    return served


class Models:
    """The models of a server, by name. Raises `OptionError` for adapters that have no model."""

    def __init__(
        self,
        names: Sequence[str],
        options: ServerOptions,
        loading: ModelOptions,
        running: EngineOptions,
    ) -> None:
        self.names, self._options, self._loading = tuple(dict.fromkeys(names)), options, loading
        self._running, self.created = running, int(time.time())
        self.served = served_names(self.names, options.adapters)
        given = options.memory_gb
        self.budget = recommended_bytes() if given is None else int(given * 1e9)
        self.loaded: dict[str, Model] = {}
        self.cache = SharedCache(options.cache_mb * 2**20, self._room)
        self.ready = False  # all that fits at the start has been loaded
        self._sources: dict[str, Source] = {}
        self._users = Counter[str]()  # requests that are answered, or wait for their model
        self._loads: dict[str, asyncio.Task[Model]] = {}
        self._lock = asyncio.Lock()  # one model is loaded at a time
        self._draft: Engine | None = None

    async def load(self, worker: Worker) -> None:
        """Load the models that fit together, the first ones first.

        Raises an `OpenELMError` for what cannot be loaded, and for one that does not fit alone.
        """
        self._worker = worker
        await worker.call(self._look)
        for name in self.names:
            if self._sources[name].nbytes <= self._room():
                self.loaded[name] = await worker.call(partial(self._open, name))
        self.ready = True

    async def close(self) -> None:
        """Keep nothing; no request may be left."""
        for model in self.loaded.values():
            await self._worker.call(partial(self._close, model))
        self.loaded.clear()
        self.cache.clear()

    def _look(self) -> None:
        """Find the folder and the size of each model; fetch what is not there yet."""
        options, draft = self._loading, self._options.draft_model
        if draft is not None:
            self._draft = load(draft, options.dtype, tokenizer=options.tokenizer)
        for name in self.names:
            resolved = resolve_model(name, options.revision, options.tokenizer)
            headers = read_headers(resolved.folder)
            size, context = loaded_bytes(headers, options), headers.config.max_context_length
            if size > self._room():
                what = f"{name} takes {size / 1e9:.4g} GB, of {self._room() / 1e9:.4g} that are"
                raise OptionError(f"{what} left of memory_gb; give more, or quantize the model")
            instruct = speaks_instruct(resolved.folder, name)
            self._sources[name] = Source(resolved, size, context, instruct)

    def _room(self) -> int:
        """Return the bytes of the budget that weights and running requests leave."""
        models = list(self.loaded.values())  # the event loop may add one meanwhile
        weights = sum(self._sources[model.name].nbytes for model in models)
        draft = 0 if self._draft is None else self._draft.nbytes
        return self.budget - weights - draft - sum(model.batch.nbytes for model in models)

    def _open(self, name: str) -> Model:
        """Load a model with its adapters. The device's thread calls this."""
        options, source = self._options, self._sources[name]
        engine = load_resolved(name, source.resolved, self._loading)
        source.nbytes = engine.nbytes
        for one in self.served.values():
            if one.base == name and one.folder is not None:
                source.nbytes += engine.load_adapter(one.folder, one.adapter).nbytes - engine.nbytes
        most = options.queue + options.slots
        shared: Any = {"prompt_cache": self.cache if options.cache_mb else None}
        shared["max_waiting"] = most
        if self._draft is not None:
            shared["draft"] = ModelDraft(engine, self._draft)
            shared["draft"].store = self.cache
        return Model(
            name, engine, BatchEngine(engine, options.slots, self._running, **shared), most
        )

    async def use(self, name: str | None, stack: ExitStack) -> tuple[Model, Served]:
        """Return a model by a name, the first one for None; it is loaded if it is not yet.

        It stays until `stack` is closed. Raises `ApiError`: 404 for an unknown name, 503 if the
        model cannot be loaded now.
        """
        name = self.names[0] if name is None else name
        if name not in self.served:
            known = ", ".join(self.served)
            what = f"the model {shown(name)} is not served here; there is {known}"
            raise ApiError(404, what, param="model", code="model_not_found")
        served = self.served[name]
        self._users[served.base] += 1
        stack.callback(self._leave, served.base)
        model = self.loaded.get(served.base)
        if model is None and not self.ready:
            what = f"{served.base} is being loaded; try again in a few seconds"
            raise ApiError(503, what, code="model_loading", headers=RETRY)
        if model is None:
            model = await self._shared_load(served.base)
        model.used = time.monotonic()
        return model, served

    def _leave(self, base: str) -> None:
        self._users[base] -= 1

    async def _shared_load(self, name: str) -> Model:
        """Load a model once for all who wait for it; all get its error, if it has one."""
        if name not in self._loads:

            def done(task: asyncio.Task[Model]) -> None:
                del self._loads[name]
                if not task.cancelled():
                    task.exception()  # those who waited may all have left

            self._loads[name] = asyncio.create_task(self._load(name))
            self._loads[name].add_done_callback(done)
        return await asyncio.shield(self._loads[name])

    async def _load(self, name: str) -> Model:
        """Make room for a model, and load it."""
        async with self._lock:
            await self._make_room(name)
            try:
                model = await self._worker.call(partial(self._open, name))
            except OpenELMError as error:
                what = f"{name} cannot be loaded: {error}"
                raise ApiError(503, what, code="model_not_loaded", headers=RETRY) from None
            except Exception:
                log.exception("%s cannot be loaded", name)
                raise
            self.loaded[name] = model
            return model

    async def _make_room(self, name: str) -> None:
        """Unload what nobody uses, as much as a model needs; the prefix cache gives way first.

        Raises `ApiError` if that is too little.
        """
        need, room = self._sources[name].nbytes, self._room()
        leaving = []
        # by name: a reference to a model would keep it while it is unloaded
        for other in sorted(self.loaded, key=lambda one: self.loaded[one].used):
            if need > room and not self._users[other]:
                room += self._sources[other].nbytes
                leaving.append(other)
        if need > room:
            what = f"there is no memory for {name} while other models answer requests"
            raise ApiError(503, f"{what}; try again later", code="model_not_loaded", headers=RETRY)
        await self.unload(leaving)
        await self._worker.call(partial(self.cache.shrink, room - need))

    async def unload(self, names: Sequence[str]) -> None:
        """Free the memory of models, which nobody may use."""
        leaving = [self.loaded.pop(name) for name in names]  # nobody finds them from here on
        while leaving:
            log.info("%s is unloaded", leaving[-1].name)
            await self._worker.call(partial(self._close, leaving.pop()))
        if names:
            await self._worker.call(free)  # when nothing refers to them any more

    def _close(self, model: Model) -> None:
        """Keep nothing of a model. The device's thread calls this."""
        self._worker.forget(model.batch)
        model.batch.close()
        for engine in (model.engine, *model.engine.adapters.values()):
            self.cache.forget(engine.steps.refresh())

    def described(self) -> list[dict[str, Any]]:
        """Return what is served as OpenAI's clients know models, with context and format."""
        return [
            {
                "id": one.name,
                "object": "model",
                "created": self.created,
                "owned_by": "openelm-mlx",
                "context_length": source.context,
                "instruct": source.instruct,
                "loaded": one.base in self.loaded,
            }
            for one in self.served.values()
            if (source := self._sources.get(one.base)) is not None
        ]


def free() -> None:
    """Return the memory of what is no longer used to the system."""
    gc.collect()
    mx.clear_cache()
