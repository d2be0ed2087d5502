"""Several models within a budget of memory, their adapters and their drafts."""

from __future__ import annotations

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from adapter_folders import peft_folder
from formats import TINY, random_folder
from serving import SECONDS, server_of, serving, wait_for

from openelm_mlx import generate, load
from openelm_mlx.device import mx
from openelm_mlx.engine.options import EngineOptions, ModelOptions
from openelm_mlx.errors import OptionError
from openelm_mlx.server.models import Models, served_names
from openelm_mlx.server.options import ServerOptions
from openelm_mlx.server.worker import Worker

LARGER = replace(TINY, ffn_multipliers=(256.0,))
LENGTH = 16
EAGER = EngineOptions(compiled=False)
PROMPT = [1, 5, 9, 7, 3]
BODY = {"prompt": PROMPT, "max_tokens": LENGTH, "ignore_eos": True, "temperature": 0.9, "seed": 3}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three models of about the same size, in a few megabytes."""
    root = tmp_path_factory.mktemp("models")
    return [str(random_folder(root / name, LARGER, seed, 0.5)) for seed, name in enumerate("abc")]


CLIENT = httpx.Client(timeout=SECONDS)


def ask(address: str, **body: Any) -> httpx.Response:
    return CLIENT.post(f"{address}/v1/completions", json={**BODY, **body})


def text(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def loaded(address: str) -> list[bool]:
    data = CLIENT.get(f"{address}/v1/models").json()["data"]
    return [one["loaded"] for one in data]


def alone(folder: str, prompt: list[int] = PROMPT, **settings: Any) -> str:
    engine, named = load(folder, **settings), dict(BODY)
    del named["prompt"]
    return generate(engine, prompt, engine_options=EAGER, **named)


def test_models_take_turns_in_the_memory_there_is(folders: list[str]):
    size = load(folders[0]).nbytes
    limits = {"memory_gb": 2.5 * size / 1e9, "running": EAGER}
    with server_of(*folders, **limits) as (server, address):
        assert loaded(address) == [True, True, False]
        before = mx.get_active_memory()
        expected = [alone(folder) for folder in folders]
        assert text(ask(address, model=folders[0])) == expected[0]
        assert text(ask(address, model=folders[2])) == expected[2]
        assert loaded(address) == [True, False, True]  # the least recently used one has gone
        assert mx.get_active_memory() < before + size / 4
        assert [text(ask(address, model=one)) for one in folders] == expected
        models = server.app.state.models
        weights = [model.engine.steps.refresh() for model in models.loaded.values()]
        assert {entry.weights for entry in models.cache._entries} == set(weights)
        with CLIENT.stream(
            "POST",
            f"{address}/v1/completions",
            json={**BODY, "model": folders[0], "max_tokens": 1900, "stream": True, "n": 2},
        ) as running:
            lines = running.iter_lines()
            next(lines)
            with ThreadPoolExecutor(4) as pool:  # all ask for the one that is not loaded
                both = list(pool.map(lambda one: ask(address, model=one), folders[1:] * 2))
            assert {answer.status_code for answer in both} <= {200, 503}
            assert loaded(address)[0]
            rest = [next(lines) for _ in range(20)]
        assert any(rest) and not any("error" in line for line in rest)


@pytest.mark.parametrize("stream", [False, True])
def test_the_memory_of_a_model_is_free_while_its_clients_stay_connected(
    folders: list[str], stream: bool
):
    size, found = load(folders[0]).nbytes, []
    gc.collect()
    with serving(*folders, memory_gb=1.5 * size / 1e9, running=EAGER) as address, ExitStack() as on:
        for folder in folders:
            client = on.enter_context(httpx.Client(base_url=address, timeout=SECONDS))
            answer = client.post(
                "/v1/completions", json={**BODY, "model": folder, "stream": stream}
            )
            assert answer.status_code == 200
            found.append(mx.get_active_memory())
    assert max(found[1:]) < found[0] + size / 4


def test_nothing_that_runs_makes_room(folders: list[str]):
    size = load(folders[0]).nbytes

    async def test() -> None:
        models = Models(folders, ServerOptions(memory_gb=1.5 * size / 1e9), ModelOptions(), EAGER)
        await models.load(Worker())
        assert models.ready and list(models.loaded) == folders[:1]
        with ExitStack() as used:
            await models.use(folders[0], used)
            with pytest.raises(Exception, match="no memory for .*b while other models") as error:
                await models.use(folders[1], used)
            assert error.value.status == 503 and "Retry-After" in error.value.headers
        opened = []
        original = models._open
        models._open = lambda name: opened.append(name) or original(name)
        with ExitStack() as used:
            both = await asyncio.gather(*(models.use(folders[1], used) for _ in range(3)))
            assert len({id(model) for model, _ in both}) == 1
        assert opened == folders[1:2] and list(models.loaded) == folders[1:2]

    asyncio.run(test())


def test_a_load_counts_as_time_of_the_request_and_a_client_may_leave_meanwhile(
    folders: list[str],
):
    size, go = load(folders[0]).nbytes, threading.Event()
    with server_of(*folders[:2], memory_gb=1.5 * size / 1e9, running=EAGER) as (server, address):
        models, worker = server.app.state.models, server.app.state.worker
        asked, original = [], models._open
        models._open = lambda name: go.wait(SECONDS) and original(name)
        worker.submit = lambda ticket: asked.append(ticket) or Worker.submit(worker, ticket)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/completions", json={**BODY, "model": folders[1]}, timeout=0.1)
        worker.seconds = 0.1
        late = ask(address, model=folders[1])
        assert late.status_code == 504 and late.json()["error"]["code"] == "timeout"
        worker.seconds = SECONDS
        go.set()
        wait_for(lambda: not server.guard.running)
        assert asked == []
        assert text(ask(address, model=folders[1])) == alone(folders[1])


def test_a_load_that_fails_gives_everybody_the_error_and_is_tried_again(
    folders: list[str], tmp_path: Path
):
    size, other = load(folders[0]).nbytes, random_folder(tmp_path / "other", LARGER, 7, 0.5)
    weights = other / "model.safetensors"
    with serving(folders[0], str(other), memory_gb=1.5 * size / 1e9, running=EAGER) as address:
        data = weights.read_bytes()
        weights.write_bytes(data[: len(data) // 2])
        with ThreadPoolExecutor(2) as pool:
            answers = list(pool.map(lambda _: ask(address, model=str(other)), range(2)))
        for answer in answers:
            assert answer.status_code == 503
            message = answer.json()["error"]["message"]
            assert message.startswith(f"{other} cannot be loaded: ")
        weights.write_bytes(data)
        assert text(ask(address, model=str(other))) == alone(str(other))


def test_a_model_that_does_not_fit_alone_is_refused_at_the_start(folders: list[str]):
    async def test() -> None:
        options = ServerOptions(memory_gb=0.001)
        models = Models(folders, options, ModelOptions(dtype="float32"), EAGER)
        what = r"takes 0.003\d* GB, of 0.001 that are left of memory_gb; give more, or quantize"
        with pytest.raises(OptionError, match=what):
            await models.load(Worker())
        assert not models.ready

    asyncio.run(test())


def test_a_request_chooses_an_adapter_by_the_models_name(folders: list[str], tmp_path: Path):
    story = peft_folder(tmp_path / "story", LARGER, seed=1, lora_alpha=400)
    rhyme = peft_folder(tmp_path / "rhyme", LARGER, seed=2, lora_alpha=400)
    name = folders[0]
    with serving(name, adapters=(str(story), f"poem={rhyme}"), running=EAGER) as address:
        data = CLIENT.get(f"{address}/v1/models").json()["data"]
        assert [one["id"] for one in data] == [name, f"{name}:story", f"{name}:poem"]
        texts = [text(ask(address, model=one["id"])) for one in data]
        assert texts == [alone(name), *(alone(name, adapter=one) for one in (story, rhyme))]
        assert len(set(texts)) == 3
        answer = ask(address, model=f"{name}:other")
        assert answer.status_code == 404
        assert f"'{name}:other' is not served here; there is {name}, " in answer.text


@pytest.mark.parametrize(
    ("names", "adapters", "message"),
    [
        (["a", "b"], ["x=."], "there are 2 models; say whose it is, as in a:NAME=FOLDER"),
        (["a"], ["x=.", "a:x=."], "two adapters are called a:x; give one another name"),
        (["a"], ["x=nowhere"], "adapter is 'x=nowhere'; there is no folder nowhere"),
    ],
)
def test_adapters_that_cannot_be_named_are_refused(
    names: list[str], adapters: list[str], message: str
):
    with pytest.raises(OptionError, match=message):
        served_names(names, adapters)


def test_each_model_has_its_own_adapters():
    served = served_names(["a", "b:c"], ["a:x=.", "b:c:y=tests"])
    assert [(one.base, one.adapter) for one in served.values()] == [
        ("a", None),
        ("b:c", None),
        ("a", "x"),
        ("b:c", "y"),
    ]


@pytest.mark.parametrize("settings", [{"draft": True, "cache_mb": 0}, {"prompt_lookup": 2}])
def test_drafts_and_caches_do_not_change_answers(folders: list[str], settings: dict[str, Any]):
    if settings.pop("draft", False):
        settings["draft_model"] = folders[1]
    with server_of(folders[0], **settings, running=EAGER) as (server, address):
        prompt = PROMPT * 5
        texts = [text(ask(address, prompt=prompt)) for _ in range(2)]
        assert texts == [alone(folders[0], prompt)] * 2
        assert bool(len(server.app.state.models.cache)) == ("cache_mb" not in settings)
        assert drafted(address) > 0 or "draft_model" not in settings


def test_a_requests_prompt_lookup_goes_over_the_servers(folders: list[str]):
    loop = {"temperature": 0.0, "repetition_penalty": 1.0, "max_tokens": 80}
    with serving(folders[0], prompt_lookup=2, running=EAGER) as address:
        without = text(ask(address, prompt_lookup=0, **loop))
        assert drafted(address) == 0
        assert text(ask(address, **loop)) == without
        assert drafted(address) > 0


def drafted(address: str) -> float:
    """Return how many tokens a server has drafted."""
    lines = CLIENT.get(f"{address}/metrics").text.splitlines()
    return sum(
        float(line.split()[-1]) for line in lines if line.startswith("openelm_draft_tokens_total")
    )
