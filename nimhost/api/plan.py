"""What would become of a deployment: of one that is there, and of one that nobody has made."""

from __future__ import annotations

from typing import Any

from msgspec import Struct
from msgspec.structs import fields as struct_fields
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from nimhost.api.decode import read_fields
from nimhost.api.deploy import config_of
from nimhost.api.http import JsonReply, read_json
from nimhost.api.parts import Parts, Preview
from nimhost.api.resource import get_entity
from nimhost.api.rules import complete
from nimhost.entities import DeploymentConfig, Fileset
from nimhost.errors import NotReady
from nimhost.kinds import KINDS
from nimhost.refs import DEFAULT_WORKSPACE

Json = dict[str, Any]
PATH = "/apis/nimhost/v1/plan"


class PlanBody(Struct, frozen=True, kw_only=True):
    """What `nimhost deploy` would create: a deployment config, and the fileset of its model when it has one.

    `config.model_spec.model_name` is the name that fileset and model would get.
    """

    config: DeploymentConfig
    fileset: Fileset | None = None
    workspace: str = DEFAULT_WORKSPACE


def routes(parts: Parts) -> list[Route]:
    plans = Plans(parts)
    deployment = f"{KINDS['deployments'].path('{workspace}')}/{{name}}"
    return [
        Route(PATH, plans.of_wish, methods=["POST"]),
        Route(f"{deployment}/plan", plans.of_deployment, methods=["GET"]),
    ]


class Plans:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def of_deployment(self, request: Request) -> Response:
        store, where = self._parts.store, request.path_params
        deployment = await get_entity(store, "deployments", where["workspace"], where["name"])
        config = await config_of(deployment.wish, deployment.workspace, store)
        return JsonReply(await self._preview().explain(config, deployment))

    async def of_wish(self, request: Request) -> Response:
        body = PlanBody(**read_fields(struct_fields(PlanBody), await read_json(request)))
        settings, store = self._parts.settings, self._parts.store
        fileset = body.fileset and await complete("filesets", body.fileset, body.workspace, store, settings)
        config = await complete("deployment-configs", body.config, body.workspace, store, settings)
        return JsonReply(await self._preview().explain_wish(body.workspace, config, fileset))

    def _preview(self) -> Preview:
        if self._parts.previews is None:
            raise NotReady("This daemon cannot look at the machine.")
        return self._parts.previews
