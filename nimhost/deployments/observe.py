"""One complete reading of the machine: containers, GPUs, images, weights, health."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from pathlib import Path

from msgspec import Struct

from nimhost.deployments.desired import Desired, HubWeights, LocalWeights
from nimhost.deployments.labels import Labels, read_labels
from nimhost.deployments.observed import GpuSlot, Instance, Located, Observed
from nimhost.deployments.probe import Prober, Target
from nimhost.errors import DockerUnavailable, HostError
from nimhost.host.containers import Container, Containers
from nimhost.host.gpus import Gpu, Gpus, limited
from nimhost.host.weights import Repo, Weights
from nimhost.models.checkpoint import is_weights_dir
from nimhost.refs import Ref

HOLDING = frozenset({"running", "paused", "restarting", "removing"})
"""States in which a container has its GPUs. One that exited holds none."""
LOG_LINES = 80


class Claim(Struct, frozen=True):
    """A container on this machine and the GPUs it asked for."""

    holder: str
    gpu_ids: tuple[str, ...]


class Observer:
    """Reads; changes nothing. Keeps what cannot change: the log tail of a container that exited."""

    def __init__(
        self,
        *,
        containers: Containers,
        gpus: Gpus,
        devices: Iterable[str],
        weights: Weights,
        prober: Prober,
        owner: str,
        files_root: Path,
    ) -> None:
        self._containers = containers
        self._gpus = gpus
        self._devices = tuple(devices)
        self._weights = weights
        self._prober = prober
        self._owner = owner
        self._files_root = files_root
        self._log_tails: dict[str, str] = {}
        self.unowned: frozenset[str] = frozenset()
        """Containers that carry our label but that our database cannot know: never touched."""
        self.epoch = 0
        """The newest start in our database."""
        self.gpus: tuple[Gpu, ...] = ()
        """The last inventory, for those who only show it."""
        self.claims: tuple[Claim, ...] = ()

    async def read(self, desired: Iterable[Desired]) -> Observed:
        desired = tuple(desired)
        try:
            containers = await self._containers.list()
        except DockerUnavailable as error:
            return Observed(docker_problem=f"{error.message} {error.hint or ''}".strip())
        ours = [(c, labels) for c in containers if (labels := self._ours(c)) is not None]
        self._prober.watch(self._targets(ours, desired))
        tails = await self._read_log_tails(ours)
        instances = tuple(self._instance(c, labels, tails) for c, labels in ours)
        self.claims = tuple(Claim(_holder(c), c.gpu_ids) for c in containers if c.state in HOLDING and c.gpu_ids)
        gpus, gpu_problem = await self._read_gpus()
        idle = [d for d in desired if d.order and not _runs(d, instances)]
        images, weights = await asyncio.gather(self._read_images(idle), self._read_weights(idle))
        return Observed(
            instances=instances,
            gpus=gpus,
            gpu_problem=gpu_problem,
            images=images,
            weights=weights,
        )

    def _ours(self, container: Container) -> Labels | None:
        labels = read_labels(container.labels)
        if labels is None or labels.owner != self._owner or container.id in self.unowned:
            return None
        if labels.epoch > self.epoch:  # our database was restored from a copy older than this container
            self.unowned |= {container.id}
            return None
        return labels

    def _targets(self, ours: list[tuple[Container, Labels]], desired: tuple[Desired, ...]) -> dict[str, Target]:
        served = {d.status.run.ready_container for d in desired}
        return {
            c.id: Target(url=f"http://127.0.0.1:{c.port}", probe=labels.probe, was_ready=c.id in served)
            for c, labels in ours
            if c.state == "running" and c.port
        }

    async def _read_log_tails(self, ours: list[tuple[Container, Labels]]) -> Mapping[str, str]:
        exited = [c.id for c, _ in ours if c.state in ("exited", "dead")]
        self._log_tails = {key: tail for key, tail in self._log_tails.items() if key in exited}
        for key in exited:
            if key not in self._log_tails:
                self._log_tails[key] = await self._containers.log_tail(key, LOG_LINES)
        return self._log_tails

    def _instance(self, c: Container, labels: Labels, tails: Mapping[str, str]) -> Instance:
        state = {"created": "created", "exited": "exited", "dead": "exited"}.get(c.state, "running")
        return Instance(
            id=c.id,
            ref=labels.deployment,
            hash=labels.hash,
            state=state,  # type: ignore[arg-type]
            exit_code=c.exit_code,
            oom_killed=c.oom_killed,
            started_at=c.started_at,
            port=c.port,
            health=self._prober.health(c.id),
            log_tail=tails.get(c.id, ""),
        )

    async def _read_gpus(self) -> tuple[tuple[GpuSlot, ...], str | None]:
        facts = limited(await self._gpus.read(), self._devices)
        self.gpus = facts.gpus
        holders = claimed(self.gpus, self.claims)
        slots = (GpuSlot(uuid=g.uuid, index=g.index, holder=holders.get(g.uuid)) for g in facts.gpus)
        return tuple(slots), facts.problem

    async def _read_images(self, desired: list[Desired]) -> Mapping[Ref, str | None]:
        found = {}
        for d in desired:
            image = await self._containers.image(resolved_image(d))
            found[d.ref] = image.id if image else None
        return found

    async def _read_weights(self, desired: list[Desired]) -> Mapping[Ref, Located | None]:
        found = {}
        for d in desired:
            if d.weights is not None:
                try:
                    found[d.ref] = await self.locate(d.weights)
                except HostError:  # fetching them meets the same, and there it has consequences
                    found[d.ref] = None
        return found

    def local_problem(self, weights: HubWeights | LocalWeights | None) -> str | None:
        """Why a directory of this machine cannot be served; None for weights that are not in one."""
        if not isinstance(weights, LocalWeights):
            return None
        return weights_problem(local_directory(weights, self._files_root))

    async def locate(self, weights: HubWeights | LocalWeights) -> Located | None:
        """Where these weights are on this machine; None while they are not, or not complete."""
        if isinstance(weights, LocalWeights):
            directory = local_directory(weights, self._files_root)
            return None if weights_problem(directory) else Located(source=str(directory))
        snapshot = await asyncio.to_thread(self._weights.present, repo_of(weights))
        if snapshot is None:
            return None
        subdirectory = snapshot.path.removeprefix(snapshot.repo_dir).strip("/")
        return Located(source=snapshot.repo_dir, subdirectory=subdirectory, commit=snapshot.commit)


def repo_of(weights: HubWeights) -> Repo:
    return Repo(
        repo_id=weights.repo_id, revision=weights.revision, repo_type=weights.repo_type, endpoint=weights.endpoint
    )


def local_directory(weights: LocalWeights, files_root: Path) -> Path:
    if weights.directory is not None:
        return Path(weights.directory)
    return files_root / weights.fileset.workspace / weights.fileset.name


def weights_problem(directory: Path) -> str | None:
    """Why a directory cannot be served; None when it can."""
    try:
        names = [path.name for path in directory.iterdir() if path.is_file()]
    except OSError as error:
        return f"Cannot read the directory {directory}: {error.strerror}."
    problem = is_weights_dir(names)
    return f"{directory}: {problem}" if problem else None


def resolved_image(d: Desired) -> str:
    """The image this wish was resolved to when it first started, else the name it asks for."""
    run = d.status.run
    return run.image_id if run.image_id is not None and run.spec_hash == d.hash else d.image


def claimed(gpus: Iterable[Gpu], claims: Iterable[Claim]) -> dict[str, str]:
    """GPU uuid -> who holds it. A claim names uuids or indexes, or just wants a number of GPUs: the first ones."""
    holders: dict[str, str] = {}
    ordered = sorted(gpus, key=lambda g: g.index)
    for claim in claims:
        for wanted in claim.gpu_ids:
            for gpu in _named(wanted, ordered):
                holders.setdefault(gpu.uuid, claim.holder)
    return holders


def _named(wanted: str, gpus: list[Gpu]) -> list[Gpu]:
    if wanted == "all":
        return gpus
    if wanted.startswith("count:"):
        return gpus[: int(wanted.removeprefix("count:"))]
    return [gpu for gpu in gpus if wanted in (gpu.uuid, str(gpu.index))]


def _holder(container: Container) -> str:
    labels = read_labels(container.labels)
    return str(labels.deployment) if labels else f"container {container.name}"


def _runs(d: Desired, instances: tuple[Instance, ...]) -> bool:
    return any(i.ref == d.ref and i.hash == d.hash and i.state == "running" for i in instances)
