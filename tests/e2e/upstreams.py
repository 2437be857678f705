"""Stand-ins for the providers outside: NVIDIA Build, OpenAI and Anthropic, each strict about its key.

Only the addresses differ from the real ones: `Upstreams.addresses` says which stands in for which.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from tests.fakes.engine import FakeEngine, Received, Reply

NVIDIA_KEY, OPENAI_KEY, ANTHROPIC_KEY = "nvapi-stand-in", "sk-stand-in", "sk-ant-stand-in"


class Upstream(FakeEngine):
    """A FakeEngine that answers nobody without these headers, and nobody who shows it other credentials."""

    def __init__(self, headers: dict[str, str], *served: str) -> None:
        super().__init__(served=served, tag="outside")
        self.headers = headers
        self.refused: list[Received] = []

    async def answer(self, request: Received) -> Reply:
        others = {"authorization", "x-api-key"} - self.headers.keys()
        wrong = any(request.header(name) != value for name, value in self.headers.items())
        if wrong or any(request.header(name) for name in others):
            self.refused.append(request)
            return Reply(401, {"error": {"message": "Incorrect API key provided", "type": "invalid_request_error"}})
        return await super().answer(request)


class Anthropic(Upstream):
    """Its own forms of `/v1/models` and `/v1/messages`."""

    async def _route(self, request: Received) -> Reply:
        if (request.method, request.path) == ("GET", "/v1/models"):
            cards = [{"type": "model", "id": name, "display_name": name, "created_at": "2026-01-01T00:00:00Z"}
                     for name in self.served]  # fmt: skip
            return Reply(
                200, {"data": cards, "has_more": False, "first_id": cards[0]["id"], "last_id": cards[-1]["id"]}
            )
        if (request.method, request.path) == ("POST", "/v1/messages"):
            return Reply(200, self._message(request.json()))
        return Reply(404, {"type": "error", "error": {"type": "not_found_error", "message": "Not found"}})

    def _message(self, body: dict[str, Any]) -> dict[str, Any]:
        content = [{"type": "text", "text": f"Hello from {self.tag} as {body['model']}"}]
        return {
            "id": "msg_1", "type": "message", "role": "assistant", "model": body["model"], "content": content,
            "stop_reason": "end_turn", "usage": {"input_tokens": 1, "output_tokens": 1},
        }  # fmt: skip


class Upstreams:
    """All three, on a loop in a thread of their own, from `with` to the end of it."""

    def __init__(self) -> None:
        self.nvidia = Upstream(
            {"authorization": f"Bearer {NVIDIA_KEY}"},
            "nvidia/llama-3.3-nemotron-super-49b-v1",
            "meta/llama-3.1-8b-instruct",
        )
        self.openai = Upstream({"authorization": f"Bearer {OPENAI_KEY}"}, "gpt-4", "gpt-3.5-turbo", "gpt-2")
        self.anthropic = Anthropic(
            {"x-api-key": ANTHROPIC_KEY, "anthropic-version": "2023-06-01"}, "claude-sonnet-4", "claude-opus-4"
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)

    @property
    def addresses(self) -> dict[str, str]:
        """The real address -> the one that stands in for it."""
        return {
            "https://integrate.api.nvidia.com": self.nvidia.url,
            "https://api.openai.com/v1": f"{self.openai.url}/v1",
            "https://api.anthropic.com": self.anthropic.url,
        }

    def __enter__(self) -> Upstreams:
        self._thread.start()
        for upstream in (self.nvidia, self.openai, self.anthropic):
            asyncio.run_coroutine_threadsafe(upstream.start(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        for upstream in (self.nvidia, self.openai, self.anthropic):
            asyncio.run_coroutine_threadsafe(upstream.stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()
