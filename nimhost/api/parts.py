"""What the API is made of: handed in by the daemon, so that this layer starts nothing and owns nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from nimhost.api.access import TokenTable
from nimhost.config import Settings
from nimhost.deployments.weights_stock import Stock
from nimhost.entities import DeploymentConfig, Entity, Fileset
from nimhost.gateway.proxy import Gateway
from nimhost.host.files import FileStorage
from nimhost.host.hub_files import HubFiles
from nimhost.host.vault import Vault
from nimhost.refs import Ref
from nimhost.store import Store

Json = dict[str, Any]
CheckDeployment = Callable[[Entity, bool], Awaitable[None]]
"""Called with the config (in the version to be run) before a deployment is created or updated, and whether it is to
be tried although it cannot fit.

Raises BadRequest or InvalidRequest for what this machine can never run: more GPUs than it has, a directory without
weights, a model entity that is needed for weights and missing.
"""


class ModelSpecs(Protocol):
    """What finds out what models are."""

    async def settle(self, model: Entity) -> Entity:
        """The model with its spec, or, where that takes longer than a request may, with the reason in its status."""
        ...

    def touched(self, written: Iterable[tuple[str, str, str]]) -> None:
        """Something (kind, workspace, name) has changed that a model may have waited for, or a model itself."""
        ...


class AdapterLoading(Protocol):
    """What loads adapters into engines: see `nimhost.deployments.loading`."""

    async def check(self, fileset: Entity, model: Entity) -> int:
        """The rank of the adapter in a fileset; 0 while it is not known.

        Raises InvalidRequest, naming the field, for what can never be loaded beside that model; a HostError.
        """
        ...

    def refusal(self, rank: int, model: Ref) -> str | None:
        """Why no engine of that model that runs now can load it; None when one can, or none runs."""
        ...

    async def settle(self, ref: Ref) -> None:
        """Returns when engines are in step with the wish, or it is known why not, or after a few seconds."""
        ...

    def shown(self, row: Entity) -> Json:
        """What replies about an adapter show besides: `served_name`, `loaded_on`, `status_message`."""
        ...

    def look_again(self) -> None:
        """Files of an adapter may have changed."""
        ...


class Preview(Protocol):
    """What would become of a deployment: see `nimhost.deployments.explain`."""

    async def explain(self, config: Entity, deployment: Entity | None = None) -> Json: ...

    async def explain_wish(self, workspace: str, config: DeploymentConfig, fileset: Fileset | None) -> Json: ...


class HostView(Protocol):
    """What the running daemon can say about the machine."""

    def summary(self) -> Json:
        """For `/status` and `/apis/nimhost/v1/host`.

        `status` ("healthy", "degraded", "unhealthy"), `services` {"ready": [name], "not_ready": [{name, message}]},
        `controllers` {"healthy": bool, "status": {name: bool}}, and whatever else is known.
        """
        ...

    async def gpus(self) -> list[Json]: ...

    def readings(self) -> Json:
        """What is known without looking: `deployments` {status: how many}, `gpus` [{index, uuid, name, memory_bytes,
        used_bytes}].
        """
        ...

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
    hub: HubFiles | None = None
    """None: filesets on a hub are stored as they are said, and their files are not shown."""
    specs: ModelSpecs | None = None
    previews: Preview | None = None
    stock: Stock | None = None
    """The weights cache; None: there is none."""
    adapters: AdapterLoading | None = None
    """None: they are stored, and that is all."""
    tokens: TokenTable = field(default_factory=TokenTable)
    gateway: Gateway | None = None
    """What it counted and logged is told; None: there is nothing to tell."""
    follow: Callable[[], Awaitable[None]] | None = None
    """Returns when the gateway goes by what is stored now; None: there is none that does."""
