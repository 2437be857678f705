"""Every kind of KINDS as a resource of the client. Each call is a flow, so it is written once for both clients."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

from nimhost.client.files import Filesets
from nimhost.client.inference import Models, Providers, gateway_path
from nimhost.client.resource import POLL_S, Resource, Wire, call
from nimhost.client.streams import Chunks, Parts, Records, Text
from nimhost.client.wire import Flow, Pause, Record, Request, segment
from nimhost.errors import NotFound, NotReady, UpstreamError, UpstreamTimeout
from nimhost.kinds import KINDS

__all__ = ["POLL_S", "Resource", "Resources", "gateway_path"]


class Secrets(Resource):
    @call
    def create(self, /, name: str, *, workspace: str | None = None, **fields: Any) -> Flow[Any]:
        """`data` is another word for `value`: some published examples use it."""
        if "data" in fields:
            fields["value"] = fields.pop("data")
        return (yield Request(method="POST", path=self._all(workspace), body={"name": name, **fields}))

    @call
    def access(self, name: str, *, workspace: str | None = None) -> Flow[Any]:
        """The secret with its `value`."""
        return (yield Request(path=self._path(name, workspace, "access")))

    @call
    def rotate(self) -> Flow[Any]:
        """Encrypt the secrets of all workspaces anew."""
        return (yield Request(method="POST", path="/apis/secrets/v2/rotate-encryption-keys"))


class Deployments(Resource):
    @call
    def start(self, name: str, *, workspace: str | None = None) -> Flow[Any]:
        return (yield Request(method="POST", path=self._path(name, workspace, "start")))

    @call
    def stop(self, name: str, *, workspace: str | None = None) -> Flow[Any]:
        """Remove its containers and keep the deployment."""
        return (yield Request(method="POST", path=self._path(name, workspace, "stop")))

    @call
    def models(self, name: str, *, workspace: str | None = None) -> Flow[Any]:
        """What it serves: a Record with `models`."""
        return (yield Request(path=self._path(name, workspace, "models")))

    @call
    def update_status(self, /, name: str, *, workspace: str | None = None, **fields: Any) -> Flow[Any]:
        return (yield Request(method="POST", path=self._path(name, workspace, "status"), body=fields))

    @call
    def progress(self, name: str, *, workspace: str | None = None) -> Flow[Any]:
        """`status`, `status_message`, `desired`, and `progress` per stage: `image`, `weights`, `engine`."""
        return (yield Request(path=self._path(name, workspace, "progress")))

    def follow_progress(self, name: str, *, workspace: str | None = None, quiet_s: float = math.inf) -> Any:
        """An iterator over `progress`, a Record now and one at every change.

        Raises UpstreamTimeout when nothing changes for `quiet_s`.
        """
        path = self._path(name, workspace, "progress")
        return self.wire.stream(Request(path=path, query={"follow": "true"}, quiet_s=quiet_s), Records)

    def logs(self, name: str, *, workspace: str | None = None, follow: bool = False, tail: int | None = None) -> Any:
        """An iterator over pieces of text: the last `tail` lines (all without), then what comes if `follow`."""
        query = {"follow": "true"} if follow else {}
        if tail is not None:
            query["tail"] = str(tail)
        return self.wire.stream(
            Request(path=self._path(name, workspace, "logs"), query=query, quiet_s=math.inf if follow else None), Text
        )

    @call
    def wait(
        self,
        name: str,
        status: str = "READY",
        *,
        workspace: str | None = None,
        timeout_s: float = math.inf,
        on_entry: Callable[[Record], None] | None = None,
        on_probe: Callable[[str], None] | None = None,
    ) -> Flow[Any]:
        """Wait until it has that status; DELETED means that it is gone, and gives None.

        `on_entry` is called with the last entry of the status history, then with each new one, `on_probe` with what the
        probe of a loading engine finds, each time that is something else. A daemon that goes away meanwhile is waited
        for.
        Raises NotReady when it cannot become READY, UpstreamTimeout when the time is over, NotFound when it is gone.
        """
        deadline = time.monotonic() + timeout_s
        found: Record | None = None
        news = _News(on_entry, on_probe)
        while True:
            try:
                found = yield Request(path=self._path(name, workspace))
                news.tell(found)
                if _reached(name, found, status):
                    return found
            except NotFound:
                if status == "DELETED":
                    return None
                raise
            except UpstreamError:
                if found is None:
                    raise
            if time.monotonic() >= deadline:
                raise UpstreamTimeout(f"'{name}' is not {status} after {timeout_s:g} s. {_state(found)}")
            yield Pause(POLL_S)


class _News:
    """Tells what a look at a deployment shows that the look before did not."""

    def __init__(self, on_entry: Callable[[Record], None] | None, on_probe: Callable[[str], None] | None) -> None:
        self._on_entry = on_entry
        self._on_probe = on_probe
        self._history: list[Record] | None = None
        self._probe = ""

    def tell(self, found: Record) -> None:
        history = found["status_history"]
        before, self._history = history[:-1] if self._history is None else self._history, history
        for entry in self._history:
            if entry not in before and self._on_entry is not None:
                self._on_entry(entry)
        known, self._probe = self._probe, last_probe(found)
        if self._probe not in ("", known) and self._on_probe is not None:
            self._on_probe(self._probe)


def last_probe(deployment: Record) -> str:
    """What the probe of a loading engine found last; empty when none is loading, or the status says it already."""
    engine = (deployment.get("progress") or {}).get("engine") or {}
    found = engine.get("message") or ""
    return "" if found in deployment.get("status_message", "") else found


def _reached(name: str, found: Record, status: str) -> bool:
    """Raises NotReady for a deployment that will not become READY by waiting."""
    if status == "READY" and found.get("update") == "rolling" and found.get("desired") != "stopped":
        return False  # what it says is about the version before
    if status == "READY" and found["status"] in ("ERROR", "LOST"):
        raise NotReady(f"'{name}' is {_state(found)}", f"Read its logs: nimhost logs {name}")
    if status == "READY" and found.get("desired") == "stopped":
        raise NotReady(f"'{name}' is stopped.", f"Start it with: nimhost start {name}")
    if status == "READY" and found["status"] == "READY" and found.get("update"):
        raise NotReady(f"The update of '{name}' failed. {found['status_message']}")
    return bool(found["status"] == status)


def _state(found: Record | None) -> str:
    if not found:
        return ""
    probe = last_probe(found)
    return f"{found['status']}: {found['status_message']}" + (f" Last probe: {probe}." if probe else "")


SPECIAL: Mapping[str, type[Resource]] = {
    "secrets": Secrets,
    "filesets": Filesets,
    "models": Models,
    "deployments": Deployments,
    "providers": Providers,
}


class Resources(Wire):
    """The calls that both clients have: one resource per kind, and chat."""

    workspaces: Resource
    projects: Resource
    secrets: Secrets
    filesets: Filesets
    models: Models
    adapters: Resource
    deployment_configs: Resource
    deployments: Deployments
    providers: Providers
    virtual_models: Resource

    def __init__(self, workspace: str) -> None:
        self.workspace = workspace
        for key, kind in KINDS.items():
            setattr(self, key.replace("-", "_"), SPECIAL.get(key, Resource)(kind, self))

    def send(self, request: Request) -> Any:
        """Any request of the wire; the reply's JSON."""
        return self.run(_one(request))

    def chat(
        self,
        model: str,
        messages: list[dict[str, Any]],
        *,
        provider: str | None = None,
        workspace: str | None = None,
        **options: Any,
    ) -> Any:
        """An iterator over the chunks of a chat completion, as Records.

        `model` is a model entity (`name` or `workspace/name`), or with `provider` whatever that provider calls it.
        `options` go into the body: `temperature`, `max_tokens`, `tools`, ...
        """
        where, body_model = chat_route(model, provider, workspace or self.workspace)
        body = {"model": body_model, "messages": messages, "stream": True, **options}
        return self.stream(Request(method="POST", path=where, body=body, quiet_s=math.inf), Chunks)

    def gateway(
        self, route: str, path: str, *, method: str = "POST", body: Any = None, workspace: str | None = None
    ) -> Any:
        """An iterator over the Parts of what answers at `path` of a route: `provider/NAME`, `model/NAME`, `openai`."""
        base = gateway_path(workspace or self.workspace)
        where = "/".join((base, *map(segment, route.split("/")), "-", segment(path)))
        return self.stream(Request(method=method, path=where, body=body, quiet_s=math.inf), Parts)


def chat_route(model: str, provider: str | None, workspace: str) -> tuple[str, str]:
    """Path of the gateway, and the model to name in the body."""
    if provider is not None:
        path = f"{gateway_path(workspace)}/provider/{segment(provider)}/-/v1/chat/completions"
        return path, model
    first, slash, rest = model.partition("/")
    workspace, name = (first, rest) if slash else (workspace, first)
    return f"{gateway_path(workspace)}/openai/-/v1/chat/completions", f"{workspace}/{name}"


def _one(request: Request) -> Flow[Any]:
    return (yield request)
