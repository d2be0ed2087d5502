"""Clients as people use them: curl, OpenAI's package, LangChain, llm, Open WebUI."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Literal

import httpx
import pytest
from openai import APIStatusError, AsyncOpenAI, NotFoundError, OpenAI
from openapi_types import checked
from pydantic import BaseModel
from serving import SECONDS

from openelm_mlx import generate
from openelm_mlx.engine.loading import Engine
from openelm_mlx.server import answer_schemas as schemas

ASKED: Any = [{"role": "user", "content": "Tell me a story."}]
SAMPLED: Any = {"model": "openelm-tiny", "temperature": 0.8, "seed": 7, "max_tokens": 12}


class Cat(BaseModel):
    """A pet."""

    name: Literal["Tom", "Kit"]
    old: bool


@pytest.fixture(scope="module")
def answer(tiny: Engine) -> str:
    """Return the answer of the model in this process."""
    settings = {name: value for name, value in SAMPLED.items() if name != "model"}
    return generate(tiny, ASKED, tiny.chat_sampling, **settings)


@pytest.fixture(scope="module")
def client(address: str) -> OpenAI:
    return OpenAI(base_url=f"{address}/v1", api_key="none", timeout=SECONDS, max_retries=0)


def test_openais_client_gets_answers_and_streams(client: OpenAI, answer: str):
    assert [model.id for model in client.models.list()] == ["openelm-tiny"]
    assert client.models.retrieve("openelm-tiny").id == "openelm-tiny"
    said = client.chat.completions.create(messages=ASKED, logprobs=True, top_logprobs=2, **SAMPLED)
    assert said.choices[0].message.content == answer
    details = said.choices[0].logprobs
    assert details is not None and details.content is not None
    assert b"".join(bytes(one.bytes or []) for one in details.content).decode().strip() == answer
    assert said.usage is not None and said.usage.completion_tokens == len(details.content)
    stream = client.chat.completions.create(
        messages=ASKED,
        stream=True,
        logprobs=True,
        top_logprobs=2,
        stream_options={"include_usage": True},
        **SAMPLED,
    )
    *chunks, last = list(stream)
    deltas = [chunk.choices[0] for chunk in chunks]
    assert deltas[0].delta.role == "assistant"
    assert "".join(one.delta.content or "" for one in deltas) == answer
    streamed = [
        each for one in deltas if one.logprobs is not None for each in one.logprobs.content or ()
    ]
    assert [one.token for one in streamed] == [one.token for one in details.content]
    for here, there in zip(streamed, details.content, strict=True):  # part of one was cached
        assert here.logprob == pytest.approx(there.logprob, abs=1e-3)
        assert [one.token for one in here.top_logprobs] == [one.token for one in there.top_logprobs]
    assert last.usage is not None and last.usage.total_tokens == said.usage.total_tokens
    assert not last.choices


def test_openais_client_reads_a_form(client: OpenAI):
    said = client.chat.completions.parse(messages=ASKED, response_format=Cat, model="openelm-tiny")
    assert said.choices[0].message.parsed is not None
    assert said.choices[0].message.parsed.name in ("Tom", "Kit")


def test_openais_client_tells_errors(client: OpenAI):
    with pytest.raises(NotFoundError, match="the model 'none' is not served here"):
        client.chat.completions.create(messages=ASKED, model="none")
    with pytest.raises(APIStatusError, match="tools is not supported here") as caught:
        client.chat.completions.create(
            messages=ASKED,
            model="openelm-tiny",
            tools=[{"type": "custom", "custom": {"name": "a"}}],
        )
    assert caught.value.status_code == 400 and caught.value.body["param"] == "tools"  # type: ignore[index]


def test_openais_client_asks_for_several_at_once(address: str, answer: str):
    async def ask() -> list[str]:
        async with AsyncOpenAI(base_url=f"{address}/v1", api_key="none") as client:

            async def one() -> str:
                stream: AsyncIterator[Any] = await client.chat.completions.create(
                    messages=ASKED, stream=True, **SAMPLED
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.wait_for(asyncio.gather(*(one() for _ in range(4))), SECONDS)

    assert asyncio.run(ask()) == [answer] * 4


def shown(language: str, address: str) -> str:
    """Return the example of the page on serving in this language, for a server at an address."""
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text("utf-8")
    block = re.search(rf"^## Clients\n.*?^```{language}\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    assert block is not None
    return block[1].replace("http://127.0.0.1:8080", address)


def test_the_documented_use_of_openais_client_works(
    address: str, capsys: pytest.CaptureFixture[str]
):
    exec(compile(shown("py", address), "serving.md", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.needs("curl")
def test_the_documented_use_of_curl_works(address: str):
    command = ["sh", "-c", f"{shown('console', address).strip()} -s"]  # it goes on over lines
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stderr
    reply = json.loads(done.stdout)
    checked(reply, schemas.ChatReply)
    assert reply["choices"][0]["message"]["content"].strip()


@pytest.mark.needs("langchain-openai")
def test_langchain_is_answered(address: str, answer: str):
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(base_url=f"{address}/v1", api_key="none", **SAMPLED)  # type: ignore[arg-type]
    assert chat.invoke(ASKED).content == answer
    assert "".join(str(chunk.content) for chunk in chat.stream(ASKED)) == answer
    chat = chat.model_copy(update={"max_tokens": 64})
    cat = chat.with_structured_output(Cat, method="json_schema").invoke(ASKED)
    assert isinstance(cat, Cat)


@pytest.mark.needs("llm")
def test_llm_is_answered(address: str, answer: str, tmp_path: Path):
    known = {"model_id": "tiny", "model_name": "openelm-tiny", "api_base": f"{address}/v1"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([known]))
    options = [word for name in ("temperature", "seed", "max_tokens") for word in
               ("-o", name, str(SAMPLED[name]))]  # fmt: skip
    found = subprocess.run(
        [sys.executable, "-m", "llm", "-m", "tiny", *options, ASKED[0]["content"], "--key", "none"],
        env={**os.environ, "LLM_USER_PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    assert found.stdout.strip() == answer, found.stderr


def test_open_webui_is_answered(http: httpx.Client):
    bodies = json.loads((Path(__file__).parent / "open_webui.json").read_text("utf-8"))
    path, headers = "/v1/chat/completions", {"Authorization": "Bearer sk-none"}
    said = http.post(path, json=bodies["chat"], headers=headers)
    lines = [line[6:] for line in said.text.splitlines() if line.startswith("data: ")]
    chunks = [checked(json.loads(line), schemas.ChatChunk) for line in lines[:-1]]
    assert lines[-1] == "[DONE]" and chunks[-1]["usage"]["completion_tokens"] == 8
    for name in ("title", "tags"):
        checked(http.post(path, json=bodies[name], headers=headers), schemas.ChatReply)
