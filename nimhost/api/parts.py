"""What the API is made of: handed in by the daemon, so that this layer starts nothing and owns nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from nimhost.config import Settings
from nimhost.entities import Entity
from nimhost.host.files import FileStorage
from nimhost.host.vault import Vault
from nimhost.store import Store

Json = dict[str, Any]
CheckDeployment = Callable[[Entity], Awaitable[None]]
"""Called with the config (in the version to be run) before a deployment is created or updated.

Raises BadRequest or InvalidRequest for what this machine can never run: more GPUs than it has, a directory without
weights, a model entity that is needed for weights and missing.
"""


class HostView(Protocol):
    """What the running daemon can say about the machine."""

    def summary(self) -> Json:
        """For `/status` and `/apis/nimhost/v1/host`.

        `status` ("healthy", "degraded", "unhealthy"), `services` {"ready": [name], "not_ready": [{name, message}]},
        `controllers` {"healthy": bool, "status": {name: bool}}, and whatever else is known.
        """
        ...

    async def gpus(self) -> list[Json]: ...

    def logs(self, deployment: Entity, tail: int | None, follow: bool) -> AsyncIterator[bytes]:
        """The last `tail` lines of its container (None: all), then what comes if `follow`. Raises NotReady, NotFound
        for a deployment without a container.
        """
        ...

    def progress(self, deployment: Entity) -> Json | None:
        """Bytes of image and weights while it is being prepared; None when there is nothing to tell."""
        ...

    async def wait_progress(self) -> None:
        """Returns when the progress of some deployment changed."""
        ...


@dataclass(frozen=True, kw_only=True)
class Parts:
    store: Store
    vault: Vault
    files: FileStorage
    settings: Settings
    host: HostView
    check_deployment: CheckDeployment | None = None
