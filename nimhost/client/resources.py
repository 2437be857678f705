"""Every kind of KINDS as a resource of the client. Each call is a flow, so it is written once for both clients."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Concatenate, ParamSpec, Protocol

from nimhost.client.streams import Chunks, MakeDecoder, Records, Text
from nimhost.client.wire import Flow, Pause, Record, Request, segment
from nimhost.entities import KINDS, Kind
from nimhost.errors import NotFound, NotReady, UpstreamError, UpstreamTimeout

P = ParamSpec("P")
POLL_S = 0.5


class Wire(Protocol):
    """What a resource needs of the client it belongs to."""

    @property
    def workspace(self) -> str: ...

    def run(self, flow: Flow[Any]) -> Any: ...

    def stream(self, request: Request, decoder: MakeDecoder) -> Any: ...


def call(flow: Callable[Concatenate[Any, P], Flow[Any]]) -> Callable[Concatenate[Any, P], Any]:
    """A method that runs the flow: it returns the result, or with AsyncClient an awaitable of it."""

    @functools.wraps(flow)
    def method(self: Any, /, *args: P.args, **kwargs: P.kwargs) -> Any:
        return self.wire.run(flow(self, *args, **kwargs))

    return method


class Resource:
    """Create, get, list, update, delete. Names may be `name` or `workspace/name`; replies are Records."""

    def __init__(self, kind: Kind, wire: Wire) -> None:
        self.kind = kind
        self.wire = wire

    def _path(self, name: str = "", workspace: str | None = None, *more: str) -> str:
        first, slash, rest = name.partition("/")
        workspace, name = (first, rest) if slash else (workspace or self.wire.workspace, first)
        return "/".join((self.kind.path(segment(workspace)), *(segment(part) for part in (name, *more) if part)))

    @call
    def create(self, /, name: str, *, workspace: str | None = None, **fields: Any) -> Flow[Any]:
        """Raises AlreadyExists, InvalidRequest, and BadRequest for something it refers to that is not there."""
        return (yield Request(method="POST", path=self._path("", workspace), body={"name": name, **fields}))

    @call
    def get(self, /, name: str, *, workspace: str | None = None) -> Flow[Any]:
        return (yield Request(path=self._path(name, workspace)))

    @call
    def list(self, /, *, workspace: str | None = None, **query: str) -> Flow[Any]:
        """All of them, page after page. `query`: `sort`, `filter` and so on; `workspace="-"`: in all workspaces."""
        found: list[Record] = []
        page, pages = 1, 1
        while page <= pages:
            part = yield Request(path=self._path("", workspace), query={**query, "page": str(page)})
            found += part["data"]
            page, pages = page + 1, part["pagination"]["total_pages"]
        return found

    @call
    def update(self, /, name: str, *, workspace: str | None = None, **fields: Any) -> Flow[Any]:
        """Change the fields given (PATCH), replace it (PUT), or make a new version: what the kind does on update."""
        method = "POST" if self.kind.update == "VERSION" else self.kind.update
        return (yield Request(method=method, path=self._path(name, workspace), body=fields))

    @call
    def delete(self, /, name: str, *, workspace: str | None = None) -> Flow[Any]:
        return (yield Request(method="DELETE", path=self._path(name, workspace)))


class Secrets(Resource):
    @call
    def create(self, /, name: str, *, workspace: str | None = None, **fields: Any) -> Flow[Any]:
        """`data` is another word for `value`: some published examples use it."""
        if "data" in fields:
            fields["value"] = fields.pop("data")
        return (yield Request(method="POST", path=self._path("", workspace), body={"name": name, **fields}))

    @call
    def access(self, name: str, *, workspace: str | None = None) -> Flow[Any]:
        """The secret with its `value`."""
        return (yield Request(path=self._path(name, workspace, "access")))


class Deployments(Resource):
    @call
    def start(self, name: str, *, workspace: str | None = None) -> Flow[Any]:
        return (yield Request(method="POST", path=self._path(name, workspace, "start")))

    @call
    def stop(self, name: str, *, workspace: str | None = None) -> Flow[Any]:
        """Remove its containers and keep the deployment."""
        return (yield Request(method="POST", path=self._path(name, workspace, "stop")))

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
    ) -> Flow[Any]:
        """Wait until it has that status; DELETED means that it is gone, and gives None.

        `on_entry` is called with each new entry of the status history. A daemon that goes away meanwhile is waited for.
        Raises NotReady when it cannot become READY, UpstreamTimeout when the time is over, NotFound when it is gone.
        """
        deadline = time.monotonic() + timeout_s
        found: Record | None = None
        seen: list[Record] = []
        while True:
            try:
                found = yield Request(path=self._path(name, workspace))
                seen = _report(seen, found["status_history"], on_entry)
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


def _report(seen: list[Record], history: list[Record], on_entry: Callable[[Record], None] | None) -> list[Record]:
    for entry in history:
        if entry not in seen and on_entry is not None:
            on_entry(entry)
    return history


def _reached(name: str, found: Record, status: str) -> bool:
    """Raises NotReady for a deployment that will not become READY by waiting."""
    if status == "READY" and found["status"] in ("ERROR", "LOST"):
        raise NotReady(f"'{name}' is {_state(found)}", f"Read its logs: nimhost logs {name}")
    if status == "READY" and found.get("desired") == "stopped":
        raise NotReady(f"'{name}' is stopped.", f"Start it with: nimhost start {name}")
    return bool(found["status"] == status)


def _state(found: Record | None) -> str:
    return f"{found['status']}: {found['status_message']}" if found else ""


SPECIAL: Mapping[str, type[Resource]] = {"secrets": Secrets, "deployments": Deployments}


class Resources:
    """The calls that both clients have: one resource per kind, and chat."""

    workspaces: Resource
    secrets: Secrets
    filesets: Resource
    models: Resource
    deployment_configs: Resource
    deployments: Deployments
    providers: Resource

    def __init__(self, workspace: str) -> None:
        self.workspace = workspace
        for key, kind in KINDS.items():
            setattr(self, key.replace("-", "_"), SPECIAL.get(key, Resource)(kind, self))

    def run(self, flow: Flow[Any]) -> Any:
        raise NotImplementedError

    def stream(self, request: Request, decoder: MakeDecoder) -> Any:
        raise NotImplementedError

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


def chat_route(model: str, provider: str | None, workspace: str) -> tuple[str, str]:
    """Path of the gateway, and the model to name in the body."""
    if provider is not None:
        path = f"{gateway_path(workspace)}/provider/{segment(provider)}/-/v1/chat/completions"
        return path, model
    first, slash, rest = model.partition("/")
    workspace, name = (first, rest) if slash else (workspace, first)
    return f"{gateway_path(workspace)}/openai/-/v1/chat/completions", f"{workspace}/{name}"


def gateway_path(workspace: str) -> str:
    return f"/apis/inference-gateway/v2/workspaces/{segment(workspace)}"


def _one(request: Request) -> Flow[Any]:
    return (yield request)
