"""The weights cache over the wire: list, pull, stop, verify, prune. What takes long tells its progress as events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Literal

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nimhost.api.decode import read_struct
from nimhost.api.filesets import token_named
from nimhost.api.http import JsonReply, read_json
from nimhost.api.inference import stream_reply
from nimhost.api.parts import Parts
from nimhost.api.rules import check_remote
from nimhost.deployments.pulls import Asked
from nimhost.deployments.repos import repo_in
from nimhost.deployments.weights_stock import Stock
from nimhost.entities import HuggingFaceStorage, NgcStorage
from nimhost.errors import BadRequest, NotFound, NotReady
from nimhost.host.weights.wire import Choice, Repo
from nimhost.refs import DEFAULT_WORKSPACE, NGC_KEY, Ref, parse_ref

PATH = "/apis/nimhost/v1/weights"
Json = dict[str, Any]


class Named(Struct, frozen=True, kw_only=True):
    """A repository: of a model hub, or of NGC, and then `repo_id` is `org/team/name` and `revision` a version."""

    repo_id: str
    revision: str | None = None
    repo_type: Literal["model", "dataset", "space", "resource"] = "model"
    registry: Literal["hub", "ngc"] = "hub"
    endpoint: str | None = None


class Wanted(Named, frozen=True, kw_only=True):
    secret: str | None = None
    """Of the token that opens it, in `workspace`."""
    workspace: str = DEFAULT_WORKSPACE
    allow: list[str] = []
    ignore: list[str] = []


class Pruning(Struct, frozen=True, kw_only=True):
    unused_for_s: float = 0.0
    dry_run: bool = False


def routes(parts: Parts) -> list[Route]:
    weights = WeightsCache(parts)
    return [
        Route(PATH, weights.list, methods=["GET"]),
        Route(f"{PATH}/pull", weights.pull, methods=["POST"]),
        Route(f"{PATH}/stop", weights.stop, methods=["POST"]),
        Route(f"{PATH}/verify", weights.verify, methods=["POST"]),
        Route(f"{PATH}/prune", weights.prune, methods=["POST"]),
    ]


class WeightsCache:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def list(self, request: Request) -> Response:
        stock = self._stock()
        rows, progress = [msgspec.to_builtins(row) for row in await stock.shelved()], stock.progress()
        for row in rows:
            now = progress.get(row["folder"]) if row["state"] == "fetching" else None
            row["progress"] = msgspec.to_builtins(now)
        return JsonReply({"data": rows})

    async def pull(self, request: Request) -> Response:
        """The download does not end with the reply, nor with this daemon."""
        wanted: Wanted = read_struct(Wanted, await read_json(request))
        choice = Choice(tuple(wanted.allow), tuple(wanted.ignore))
        asked = Asked(repo_named(wanted), choice, await self._secret(wanted))
        pull = await self._stock().pulls.ask(asked)
        return await stream_reply(_events(pull.follow()), "text/event-stream")

    async def stop(self, request: Request) -> Response:
        repo = repo_named(read_struct(Named, await read_json(request)))
        if not await self._stock().pulls.stop(repo):
            raise NotFound(f"{repo} is not being pulled.", "What deployments fetch ends with: nimhost stop NAME")
        return JsonReply({"repo": str(repo)})

    async def verify(self, request: Request) -> Response:
        repo = repo_named(read_struct(Named, await read_json(request)))
        return await stream_reply(_events(self._stock().verify(repo)), "text/event-stream")

    async def prune(self, request: Request) -> Response:
        wanted: Pruning = read_struct(Pruning, await read_json(request))
        found = await self._stock().prune(wanted.unused_for_s, wanted.dry_run)
        gone = [{**msgspec.to_builtins(row), "freed_bytes": freed} for row, freed in found.gone]
        kept = [{**msgspec.to_builtins(row), "why": why} for row, why in found.kept]
        return JsonReply({"data": gone, "freed_bytes": sum(freed for _, freed in found.gone), "kept": kept})

    async def _secret(self, wanted: Wanted) -> Ref | None:
        """The secret that is named. Raises BadRequest for one that does not exist."""
        if wanted.secret is None:
            return None
        await token_named(self._parts, wanted.secret, wanted.workspace)
        return parse_ref(wanted.secret, wanted.workspace, "secret")

    def _stock(self) -> Stock:
        if self._parts.stock is None:
            raise NotReady("There is no weights cache here.")
        return self._parts.stock


def repo_named(named: Named) -> Repo:
    """Raises BadRequest for what cannot be one."""
    if named.registry == "ngc":
        org, _, rest = named.repo_id.partition("/")
        team, slash, target = rest.partition("/")
        team, target = (team, target) if slash else ("no-team", team)
        if named.repo_type not in ("model", "resource") or not target or "/" in target:
            raise BadRequest(f"'{named.repo_id}' is not an artifact of NGC.", "It looks like ngc://org/team/name:1.0")
        kind: Literal["model", "resource"] = "model" if named.repo_type == "model" else "resource"
        default = NgcStorage(org="", team="", target="", api_key_secret="").host
        ngc = NgcStorage(
            org=org, team=team, target=target, target_type=kind, version=named.revision, api_key_secret=str(NGC_KEY),
            host=named.endpoint or default,
        )  # fmt: skip
        check_remote(ngc)
        found = repo_in(ngc)
    else:
        if named.repo_type == "resource":
            raise BadRequest("A resource is something of NGC.", "One of model, dataset, space.")
        hub = HuggingFaceStorage(
            repo_id=named.repo_id, revision=named.revision or "main", repo_type=named.repo_type,
            endpoint=named.endpoint,
        )  # fmt: skip
        check_remote(hub)
        found = repo_in(hub)
    assert found is not None
    return found


async def _events(steps: AsyncIterator[Json]) -> AsyncIterator[bytes]:
    async for step in steps:
        yield b"data: " + msgspec.json.encode(step) + b"\n\n"
