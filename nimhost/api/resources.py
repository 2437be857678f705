"""The routes of every kind, generated from KINDS."""

from __future__ import annotations

from collections.abc import Mapping

from starlette.routing import Route

from nimhost.api import rotation
from nimhost.api.adapters import Adapters
from nimhost.api.deploy import Deployments
from nimhost.api.filesets import Filesets
from nimhost.api.models import Models
from nimhost.api.parts import Parts
from nimhost.api.providers import Providers
from nimhost.api.resource import Resource
from nimhost.api.secrets import Secrets
from nimhost.api.virtual_models import VirtualModels
from nimhost.api.workspaces import Projects, Workspaces
from nimhost.kinds import KINDS

SPECIAL: Mapping[str, type[Resource]] = {
    "adapters": Adapters,
    "deployments": Deployments,
    "filesets": Filesets,
    "models": Models,
    "projects": Projects,
    "providers": Providers,
    "secrets": Secrets,
    "virtual-models": VirtualModels,
    "workspaces": Workspaces,
}
"""Kinds that do more than their row of KINDS says."""


def routes(parts: Parts) -> list[Route]:
    kinds = [SPECIAL.get(key, Resource)(kind, parts) for key, kind in KINDS.items()]
    return [*rotation.routes(parts), *(route for kind in kinds for route in kind.routes())]
