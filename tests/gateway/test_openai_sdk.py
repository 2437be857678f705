"""The official OpenAI client against both OpenAI routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest

from tests.fakes.engine import FakeEngine, Faults
from tests.gateway.conftest import Door, G, engine_upstream
from tests.support import eventually

HELLO: list[Any] = [{"role": "user", "content": "Hello!"}]
TEXT = "Hello from a as qwen-served: Hello!"


@pytest.fixture(params=["/v1", f"{G}/default/openai/-/v1"], ids=["short", "workspace"])
async def client(door: Door, engine: FakeEngine, request: pytest.FixtureRequest) -> AsyncIterator[openai.AsyncOpenAI]:
    door.route(engine_upstream(engine))
    base_url = f"{door.url}{request.param}"
    async with openai.AsyncOpenAI(base_url=base_url, api_key="not-needed", max_retries=2) as client:
        yield client


@pytest.mark.parametrize("model", ["qwen", "default/qwen"])
async def test_chat(client: openai.AsyncOpenAI, model: str) -> None:
    answer = await client.chat.completions.create(model=model, messages=HELLO)
    assert answer.choices[0].message.content == TEXT
    assert answer.usage
    assert answer.usage.completion_tokens > 0


async def test_chat_as_a_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model="qwen", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).strip() == TEXT
    assert chunks[-1].usage
    assert chunks[-1].usage.prompt_tokens == 1


async def test_completion_and_embedding(client: openai.AsyncOpenAI) -> None:
    completion = await client.completions.create(model="qwen", prompt="Hello!")
    assert completion.choices[0].text == TEXT
    embeddings = await client.embeddings.create(model="qwen", input=["a", "b"])
    assert len(embeddings.data) == 2


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == ["default/qwen"]
    assert (await client.models.retrieve("qwen")).id == "default/qwen"


async def test_unknown_model_is_not_found_at_once(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="Did you mean default/qwen") as caught:
        await client.chat.completions.create(model="qwne", messages=HELLO)
    assert caught.value.code == "not_found"


async def test_model_that_is_not_ready_fails_at_once(
    client: openai.AsyncOpenAI, door: Door, engine: FakeEngine
) -> None:
    door.route(engine_upstream(engine, ready=False, message="loading weights"))
    async with asyncio.timeout(0.4):  # the client would wait longer before its first retry
        with pytest.raises(openai.InternalServerError, match="loading weights") as caught:
            await client.chat.completions.create(model="qwen", messages=HELLO)
    assert caught.value.status_code == 503


@pytest.mark.fault(27)
async def test_stream_that_breaks_off_is_an_error_for_the_client(
    client: openai.AsyncOpenAI, engine: FakeEngine
) -> None:
    engine.faults = Faults(drop_after_chunks=3)
    stream = await client.chat.completions.create(model="qwen", messages=HELLO, stream=True)
    with pytest.raises(openai.APIError, match="broke off"):
        async for _ in stream:
            pass


@pytest.mark.fault(25)
async def test_stream_that_the_client_closes_ends_at_the_engine(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.faults = Faults(chunks=10_000, chunk_delay_s=0.01)
    stream = await client.chat.completions.create(model="qwen", messages=HELLO, stream=True)
    async for _ in stream:
        break
    await stream.close()
    await eventually(lambda: engine.cancelled == 1, timeout_s=1)


async def test_synchronous_client(door: Door, engine: FakeEngine) -> None:
    door.route(engine_upstream(engine))

    def chat() -> tuple[str | None, str]:
        with openai.OpenAI(base_url=f"{door.url}/v1", api_key="x") as client:
            whole = client.chat.completions.create(model="qwen", messages=HELLO)
            stream = client.chat.completions.create(model="qwen", messages=HELLO, stream=True)
            return whole.choices[0].message.content, "".join(c.choices[0].delta.content or "" for c in stream)

    whole, streamed = await asyncio.to_thread(chat)
    assert (whole, streamed.strip()) == (TEXT, TEXT)
