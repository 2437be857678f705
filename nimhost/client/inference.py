"""Models with their adapters, and providers with their readiness."""

from __future__ import annotations

import math
import time
from typing import Any

from nimhost.client.resource import POLL_S, Resource, call
from nimhost.client.wire import Flow, Pause, Record, Request, segment
from nimhost.entities import NO_KEY
from nimhost.errors import NotFound, UpstreamTimeout


def gateway_path(workspace: str) -> str:
    return f"/apis/inference-gateway/v2/workspaces/{segment(workspace)}"


def lacks_key(provider: Record) -> bool:
    """Nothing has failed: the secret that it names was not made yet. Its message says how."""
    return (provider.get("status_message") or "").startswith(NO_KEY)


class Models(Resource):
    """Models; their adapters are `client.adapters` too, where one is found without its model."""

    @call
    def create_adapter(self, /, model: str, name: str, *, workspace: str | None = None, **fields: Any) -> Flow[Any]:
        """The adapter. Raises NotFound without that model, AlreadyExists, BadRequest without that fileset."""
        path = self._path(model, workspace, "adapters")
        return (yield Request(method="POST", path=path, body={"name": name, **fields}))

    @call
    def update_adapter(self, /, model: str, name: str, *, workspace: str | None = None, **fields: Any) -> Flow[Any]:
        return (yield Request(method="PATCH", path=self._path(model, workspace, "adapters", name), body=fields))

    @call
    def delete_adapter(self, model: str, name: str, *, workspace: str | None = None) -> Flow[Any]:
        return (yield Request(method="DELETE", path=self._path(model, workspace, "adapters", name)))


class Providers(Resource):
    @call
    def ready(self, name: str, *, workspace: str | None = None) -> Flow[Any]:
        """Raises NotFound until requests can be sent to it."""
        return (yield self._ready(name, workspace))

    @call
    def update_status(self, /, name: str, *, workspace: str | None = None, **fields: Any) -> Flow[Any]:
        return (yield Request(method="PUT", path=self._path(name, workspace, "status"), body=fields))

    @call
    def wait(self, name: str, *, workspace: str | None = None, timeout_s: float = math.inf) -> Flow[Any]:
        """Wait until requests can be sent to it: the provider.

        Raises NotFound when there is none of that name, UpstreamTimeout (with its own message) when the time is over.
        """
        deadline = time.monotonic() + timeout_s
        while True:
            found = yield Request(path=self._path(name, workspace))
            try:
                yield self._ready(name, workspace)
                return found
            except NotFound:
                if time.monotonic() >= deadline:
                    state = f"{found['status']} {found['status_message']}".strip()
                    raise UpstreamTimeout(f"Provider '{name}' is not ready after {timeout_s:g} s: {state}") from None
            yield Pause(POLL_S)

    def _ready(self, name: str, workspace: str | None) -> Request:
        ref = self.ref(name, workspace)
        return Request(path=f"{gateway_path(ref.workspace)}/provider/{segment(ref.name)}/ready")
