"""What the running daemon can say about itself and the machine: for `/status`, progress, logs and the banner."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec

from nimhost.deployments.execute import Executor, Progress
from nimhost.deployments.gpu_use import shown
from nimhost.deployments.observe import Observer
from nimhost.deployments.observed import Instance, Observed
from nimhost.deployments.plan import Verdict
from nimhost.deployments.reconciler import Reconciler
from nimhost.entities import Entity
from nimhost.errors import NotReady
from nimhost.host.containers import Containers
from nimhost.host.gpus import Gpus
from nimhost.refs import Ref

Json = dict[str, Any]

SERVICES = ("entities", "files", "inference-gateway", "models", "secrets")
PROGRESS_INTERVAL_S = 0.2
"""Followers hear of progress at most this often."""


class View:
    """Implements `api.parts.HostView` on what the reconciler saw last."""

    def __init__(self, *, containers: Containers, gpus: Gpus, observer: Observer) -> None:
        self._containers = containers
        self._gpus = gpus
        self._observer = observer
        self._observed: Observed | None = None
        self._instances: dict[Ref, Instance] = {}
        self._moved = asyncio.Event()
        self._due: asyncio.TimerHandle | None = None
        self.executor: Executor
        self.reconciler: Reconciler

    # --- fed by the reconciler

    def saw(self, verdicts: tuple[Verdict, ...], observed: Observed) -> None:
        self._observed = observed
        self._instances = {instance.ref: instance for instance in observed.instances}
        self._move()

    def progressed(self, ref: Ref, progress: Progress) -> None:
        if self._due is None:
            self._due = asyncio.get_running_loop().call_later(PROGRESS_INTERVAL_S, self._move)

    def _move(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    # --- told to the API

    def summary(self) -> Json:
        problem = self._observed.docker_problem if self._observed else "not looked at yet"
        not_ready = [{"name": "docker", "message": problem}] if problem else []
        if self._observed and self._observed.gpu_problem:
            not_ready.append({"name": "gpus", "message": self._observed.gpu_problem})
        working = self.reconciler.problem is None
        status = "healthy" if working and not not_ready else "degraded"
        return {
            "status": status,
            "services": {"ready": list(SERVICES), "not_ready": not_ready},
            "controllers": {"healthy": working, "status": {"deployments": working}},
            "docker": {"ready": problem is None, "message": problem},
            "unowned_containers": sorted(self._observer.unowned),
            "problem": self.reconciler.problem,
        }

    async def gpus(self) -> list[Json]:
        facts = await self._gpus.read()
        return [shown(gpu, self._observer.claims) for gpu in facts.gpus]

    async def logs(self, deployment: Entity, tail: int | None, follow: bool) -> AsyncIterator[bytes]:
        instance = self._instances.get(Ref(deployment.workspace, deployment.name))
        if instance is None:
            waits = deployment.wish.desired == "running" and deployment.status.status != "ERROR"
            raise NotReady(
                f"Deployment '{deployment.ref}' has no container yet: {deployment.status.status_message}",
                f"{'Follow' if waits else 'Start'} it with: nimhost {'wait' if waits else 'start'} {deployment.name}",
            )
        lines = -1 if tail is None else tail
        async with aclosing(self._containers.logs(instance.id, tail=lines, follow=follow)) as chunks:
            async for chunk in chunks:
                yield chunk

    def progress(self, deployment: Entity) -> Json | None:
        ref = Ref(deployment.workspace, deployment.name)
        progress = self.executor.progress(ref) or Progress()
        instance = self._instances.get(ref)
        loading = instance is not None and instance.state == "running" and deployment.status.status == "PENDING"
        if progress == Progress() and not loading:
            return None
        engine = {"message": instance.health.detail} if loading and instance else None
        return {**msgspec.to_builtins(progress), "engine": engine}

    async def wait_progress(self) -> None:
        await self._moved.wait()
