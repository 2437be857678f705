"""What is asked of the platform as a whole: is it alive, what is it, what machine is it on."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

import nimhost
from nimhost.api.http import JsonReply
from nimhost.api.parts import Parts


def routes(parts: Parts) -> list[Route]:
    platform = Platform(parts)
    return [
        Route("/", platform.root, methods=["GET"]),
        Route("/health/live", platform.live, methods=["GET"]),
        Route("/health/ready", platform.ready, methods=["GET"]),
        Route("/status", platform.status, methods=["GET"]),
        Route("/cluster-info", platform.cluster_info, methods=["GET"]),
        Route("/apis/auth/discovery", platform.auth_discovery, methods=["GET"]),
        Route("/apis/nimhost/v1/host", platform.host, methods=["GET"]),
        Route("/apis/nimhost/v1/gpus", platform.gpus, methods=["GET"]),
    ]


class Platform:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def root(self, request: Request) -> Response:
        return PlainTextResponse("OK")

    async def live(self, request: Request) -> Response:
        return JsonReply({"status": "live"})

    async def ready(self, request: Request) -> Response:
        """Ready to answer, without Docker too: `/status` says what is degraded."""
        return JsonReply({"status": "ready"})

    async def status(self, request: Request) -> Response:
        summary = self._parts.host.summary()
        plain = {
            "status": "healthy",
            "services": {"ready": [], "not_ready": []},
            "controllers": {"healthy": True, "status": {}},
        }
        return JsonReply(plain | summary)

    async def cluster_info(self, request: Request) -> Response:
        return JsonReply({"platform_version": nimhost.__version__, "revision": nimhost.__version__})

    async def auth_discovery(self, request: Request) -> Response:
        return JsonReply({"auth_enabled": False, "oidc": None})

    async def host(self, request: Request) -> Response:
        return JsonReply({"version": nimhost.__version__} | self._parts.host.summary())

    async def gpus(self, request: Request) -> Response:
        return JsonReply({"data": await self._parts.host.gpus()})
