"""A resource of the client. Each call is a flow, so it is written once for both clients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol

from nimhost.client.streams import MakeDecoder
from nimhost.client.wire import Flow, Record, Request, segment
from nimhost.errors import BadRequest
from nimhost.kinds import Kind
from nimhost.refs import Ref

P = ParamSpec("P")
POLL_S = 0.5


class Wire(Protocol):
    """What a client does itself; all its calls are made of this."""

    workspace: str

    def run(self, flow: Flow[Any]) -> Any:
        """The result of a flow; of AsyncClient an awaitable of it."""
        ...

    def stream(self, request: Request, decoder: MakeDecoder) -> Any:
        """An iterator over what the reply consists of, as it comes."""
        ...


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

    def ref(self, name: str, workspace: str | None = None) -> Ref:
        """`name` or `workspace/name`, which wins over the workspace given and the client's own. The workspace is empty
        for what is in none. Raises BadRequest for what cannot name one: an empty name would be the path of them all.
        """
        if not self.kind.in_workspace:
            place, own, forms = "", name, "NAME"
        else:
            first, slash, rest = name.partition("/")
            place, own = (first, rest) if slash else (workspace or self.wire.workspace, first)
            forms = "NAME or WORKSPACE/NAME"
        if not own or "/" in own or (self.kind.in_workspace and not place):
            raise BadRequest(f"'{name}' names no {self.kind.label.lower()}.", f"Write {forms}.")
        return Ref(place, own)

    def _all(self, workspace: str | None) -> str:
        return self.kind.path(segment(workspace or self.wire.workspace))

    def _path(self, name: str, workspace: str | None = None, *more: str) -> str:
        ref = self.ref(name, workspace)
        return "/".join((self.kind.path(segment(ref.workspace)), *(segment(p) for p in (ref.name, *more) if p)))

    @call
    def create(self, /, name: str, *, workspace: str | None = None, **fields: Any) -> Flow[Any]:
        """Raises AlreadyExists, InvalidRequest, and BadRequest for something it refers to that is not there."""
        return (yield Request(method="POST", path=self._all(workspace), body={"name": name, **fields}))

    @call
    def get(self, /, name: str, *, workspace: str | None = None, **query: str) -> Flow[Any]:
        return (yield Request(path=self._path(name, workspace), query=query))

    @call
    def list(self, /, *, workspace: str | None = None, **query: str) -> Flow[Any]:
        """All of them, page after page. `query`: `sort`, `filter` and so on; `workspace="-"`: in all workspaces."""
        found: list[Record] = []
        query = {"page_size": str(self.kind.page_size_max), **query}
        page, pages = 1, 1
        while page <= pages:
            part = yield Request(path=self._all(workspace), query={**query, "page": str(page)})
            found += part["data"]
            page, pages = page + 1, part["pagination"]["total_pages"]
        return found

    @call
    def page(self, /, *, workspace: str | None = None, **query: str) -> Flow[Any]:
        """One page as it comes: `data`, `pagination`. `query`: `page`, `page_size`, `sort`, `filter` and so on."""
        return (yield Request(path=self._all(workspace), query=query))

    @call
    def update(self, /, name: str, *, workspace: str | None = None, **fields: Any) -> Flow[Any]:
        """Change the fields given (PATCH), replace it (PUT), or make a new version: what the kind does on update."""
        method = "POST" if self.kind.update == "VERSION" else self.kind.update
        return (yield Request(method=method, path=self._path(name, workspace), body=fields))

    @call
    def delete(self, /, name: str, *, workspace: str | None = None, dry_run: bool = False) -> Flow[Any]:
        """`dry_run`: nothing is deleted, and the reply's `would_delete` says what would have been."""
        query = {"dry_run": "true"} if dry_run else {}
        return (yield Request(method="DELETE", path=self._path(name, workspace), query=query))

    @call
    def versions(self, name: str, *, workspace: str | None = None) -> Flow[Any]:
        """Of a kind that has versions: all of them, the newest first."""
        return (yield Request(path=self._path(name, workspace, "versions")))

    @call
    def get_version(self, name: str, version: int, *, workspace: str | None = None) -> Flow[Any]:
        return (yield Request(path=self._path(name, workspace, "versions", str(version))))

    @call
    def delete_version(self, name: str, version: int, *, workspace: str | None = None) -> Flow[Any]:
        return (yield Request(method="DELETE", path=self._path(name, workspace, "versions", str(version))))
