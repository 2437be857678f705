"""What the running daemon can say about itself and the machine: for `/status`, progress, logs and the banner."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import msgspec

from nimhost.deployments.execute import Executor, Progress
from nimhost.deployments.gpu_use import shown
from nimhost.deployments.observe import Observer
from nimhost.deployments.observed import Instance, Observed
from nimhost.deployments.probe import NOBODY_THERE
from nimhost.deployments.reconciler import Reconciler
from nimhost.deployments.situation import Verdict
from nimhost.entities import Entity
from nimhost.errors import NotReady
from nimhost.host.containers import Containers
from nimhost.host.gpus import Gpus, limited
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
        self._shown: dict[Ref, Instance] = {}
        """The container whose logs are shown: that of the version that is wished, else the one that serves."""
        self._loading: dict[Ref, tuple[Instance, bool]] = {}
        """The engine that is on its way to serve, and whether it has been READY before."""
        self._statuses = Counter[str]()
        self._moved = asyncio.Event()
        self._due: asyncio.TimerHandle | None = None
        self.executor: Executor
        self.reconciler: Reconciler

    # --- fed by the reconciler

    def saw(self, verdicts: tuple[Verdict, ...], observed: Observed) -> None:
        self._observed = observed
        by_ref = {v.desired.ref: v for v in verdicts}
        pairs = [(by_ref[i.ref], i) for i in observed.instances if i.ref in by_ref]
        pairs.sort(key=lambda pair: (pair[1].hash == pair[0].desired.hash, pair[1] == pair[0].instance))
        self._shown = {i.ref: i for _, i in pairs}
        under_way = [(v, i) for v, i in pairs if v.status == "PENDING" or v.update is not None]
        self._loading = {
            i.ref: (i, i.id in v.run.ready_containers)
            for v, i in under_way if i.state == "running" and i != v.instance
        }  # fmt: skip
        self._statuses = Counter(verdict.status for verdict in verdicts)
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

    def readings(self) -> Json:
        """As they were when the reconciler looked last."""
        gpus = [
            {key: getattr(gpu, key) for key in ("index", "uuid", "name", "memory_bytes", "used_bytes")}
            for gpu in self._observer.gpus
        ]
        return {"deployments": dict(self._statuses), "gpus": gpus}

    async def gpus(self) -> list[Json]:
        facts = await self._gpus.read()
        usable = {gpu.uuid for gpu in limited(facts, self._observer.devices).gpus}
        return [shown(gpu, self._observer.claims, gpu.uuid in usable) for gpu in facts.gpus]

    async def logs(self, deployment: Entity, tail: int | None, follow: bool) -> AsyncIterator[bytes]:
        instance = self._shown.get(Ref(deployment.workspace, deployment.name))
        if instance is None:
            raise _no_container(deployment)
        lines = -1 if tail is None else tail
        async with aclosing(self._containers.logs(instance.id, tail=lines, follow=follow)) as chunks:
            async for chunk in chunks:
                yield chunk

    def progress(self, deployment: Entity) -> Json | None:
        ref = Ref(deployment.workspace, deployment.name)
        progress = self.executor.progress(ref) or Progress()
        loading = self._loading.get(ref)
        if progress == Progress() and not loading:
            return None
        engine = {"message": _finding(*loading)} if loading else None
        return {**msgspec.to_builtins(progress), "engine": engine}

    async def wait_progress(self) -> None:
        await self._moved.wait()


def _no_container(deployment: Entity) -> NotReady:
    start = f"Start it with: nimhost start {deployment.name}"
    if deployment.wish.desired == "stopped":
        return NotReady(f"Deployment '{deployment.ref}' is stopped: there is no container, and so no logs.", start)
    if deployment.status.status == "UNKNOWN":
        away = f"The container of deployment '{deployment.ref}' cannot be reached: {deployment.status.status_message}"
        return NotReady(away, "Once Docker runs, nimhost finds it again by itself.")
    what = f"Deployment '{deployment.ref}' has no container: {deployment.status.status_message}"
    if deployment.status.status == "ERROR":
        return NotReady(what, start)
    return NotReady(what, f"Follow it with: nimhost wait {deployment.name}")


def _finding(engine: Instance, was_ready: bool) -> str:
    """What the probe of an engine found. That nobody listens yet is no fault."""
    detail = engine.health.detail
    return "not listening yet" if detail in NOBODY_THERE and not was_ready else detail


def findings(observed: Observed, observer: Observer, verdicts: tuple[Verdict, ...]) -> list[str]:
    """What the banner says was found."""
    if observed.docker_problem:
        docker = f"{observed.docker_problem}\n        Without Docker there are only external providers."
    else:
        docker = f"Docker: connected{f', version {observed.docker}' if observed.docker else ''}"
    gpus = [f"GPU {g.index}: {g.name}, {g.memory_bytes / 2**30:.0f} GiB, {g.uuid}" for g in observer.gpus]
    running = {i.ref for i in observed.instances if i.state == "running"}
    adopted = [str(v.desired.ref) for v in verdicts if v.desired.ref in running]
    return [
        docker,
        *(gpus or [f"GPUs: none. {observed.gpu_problem or ''}".rstrip()]),
        f"Adopted: {', '.join(adopted)}" if adopted else f"Deployments: {len(verdicts)}, none running",
    ]
