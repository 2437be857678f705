"""One complete reading of the machine: containers, GPUs, images, weights, health."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from msgspec.structs import replace

from nimhost.deployments.desired import Desired
from nimhost.deployments.driver import requirement
from nimhost.deployments.gpu_use import Claim, by_uuid, claims_of, slots_of
from nimhost.deployments.labels import Labels, read_labels
from nimhost.deployments.observed import Health, Instance, Located, Observed, url_of
from nimhost.deployments.offers import Offers
from nimhost.deployments.placement import released
from nimhost.deployments.probe import Prober, Target
from nimhost.deployments.readings import Readings
from nimhost.deployments.repos import repo_of
from nimhost.deployments.storage import HubWeights, LocalWeights
from nimhost.errors import DockerUnavailable, HostError
from nimhost.host.containers import Container, Containers, Image
from nimhost.host.gpus import Gpu, Gpus, limited
from nimhost.host.weights import Weights
from nimhost.models.checkpoint import is_weights_dir
from nimhost.refs import Ref

LOG_LINES = 80
SILENT = {
    "paused": "its container is paused (it goes on with: docker unpause {name})",
    "removing": "its container is being removed",
}
"""States in which no engine can answer -> what is said of it. Docker still takes connections to a paused one."""


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
        is_busy: Callable[[str], bool],
        offers: Offers,
    ) -> None:
        """`is_busy`: whether requests are under way to an engine at that address."""
        self._containers = containers
        self._gpus = gpus
        self.devices = tuple(devices)
        self._weights = weights
        self._prober = prober
        self._owner = owner
        self._files_root = files_root
        self._is_busy = is_busy
        self._offers = offers
        self._readings = Readings(containers, weights.cache_dir, owner)
        self._log_tails: dict[str, str] = {}
        self.unowned: frozenset[str] = frozenset()
        """Containers that carry our label but that our database cannot know: never touched."""
        self.epoch = 0
        """The newest start in our database."""
        self.room_made_at = 0.0
        """See Observed."""
        self.gpus: tuple[Gpu, ...] = ()
        """The last inventory, for those who only show it."""
        self.claims: tuple[Claim, ...] = ()

    async def read(self, desired: Iterable[Desired]) -> Observed:
        try:
            return await self._read(tuple(desired))
        except DockerUnavailable as error:
            self._readings.forget()
            self.gpus = limited(await self._gpus.read(), self.devices).gpus  # still shown
            return Observed(docker_problem=error.in_full)

    async def _read(self, desired: tuple[Desired, ...]) -> Observed:
        containers = await self._containers.list()
        self.unowned &= {c.id for c in containers}
        ours = [(c, labels) for c in containers if (labels := self._ours(c)) is not None]
        self._prober.watch(self._targets(ours, desired))
        tails = await self._read_log_tails(ours)
        instances = tuple(self._instance(c, labels, tails) for c, labels in ours)
        return await self._complete(instances, claims_of(containers), desired)

    async def preview(self, d: Desired) -> Observed:
        """What `d` would find if it were to start now. Never raises: without Docker it says so, and all the rest."""
        try:
            found = await self._complete((), claims_of(await self._containers.list()), (d,))
            if found.asking:
                await self._offers.settled()
                found = self._with_offers(found, [d])
            # Its own engine is no obstacle: it would make room.
            return replace(found, gpus=tuple(released(slot, str(d.ref)) for slot in found.gpus))
        except DockerUnavailable as error:
            problem = error.in_full
        facts = limited(await self._gpus.read(), self.devices)
        return Observed(
            docker_problem=problem,
            gpus=slots_of(facts.gpus, ()),
            gpu_problem=facts.problem,
            driver=facts.driver,
            cuda=facts.cuda,
            weights=await self._read_weights([d]),
            rooms=await self._readings.rooms_for_weights(d),
        )

    async def _complete(
        self, instances: tuple[Instance, ...], claims: tuple[Claim, ...], desired: tuple[Desired, ...]
    ) -> Observed:
        """With everything beside containers."""
        everything = await self._gpus.read()
        facts = limited(everything, self.devices)
        claims = by_uuid(claims, everything.gpus)
        self.gpus, self.claims = facts.gpus, claims
        idle = [d for d in desired if d.order and not _runs(d, instances)]
        images, weights = await asyncio.gather(self._read_images(idle), self._read_weights(idle))
        found = Observed(
            instances=instances,
            gpus=slots_of(facts.gpus, claims),
            gpu_problem=facts.problem,
            driver=facts.driver,
            cuda=facts.cuda,
            images={ref: image.id if image else None for ref, image in images.items()},
            requires={ref: requirement(image.env) for ref, image in images.items() if image},
            made_for={ref: image.architecture for ref, image in images.items() if image},
            weights=weights,
            room_made_at=self.room_made_at,
        )
        return await self._with_readings(found, idle)

    async def _with_readings(self, found: Observed, idle: list[Desired]) -> Observed:
        """And what only the preflight needs, for those that are to start."""
        starting = [d for d in idle if not (d.stopped or d.deleting)]
        lacking = [d for d in starting if found.images[d.ref] is None or (d.weights and found.weights[d.ref] is None)]
        try:
            gives_gpus = await self._readings.gives_gpus() if any(d.gpus for d in starting) else None
            engine = await self._readings.engine()
            found = replace(
                found, gives_gpus=gives_gpus, docker=engine.version, machine=engine.architecture,
                keeps_packed=engine.keeps_packed, rooms=await self._readings.rooms(lacking),
            )  # fmt: skip
            return self._with_offers(found, lacking)
        except DockerUnavailable:
            raise
        except HostError:
            return found  # who needs them meets the same, and there it has consequences

    def _with_offers(self, found: Observed, lacking: Iterable[Desired]) -> Observed:
        """And what registries say about the images that are still to be pulled; not once that has begun: nothing spoke
        against it, and what has come of it takes room that would be counted again."""
        wanted = [d for d in lacking if found.images[d.ref] is None and d.image and not (d.run.pulling or _given_up(d))]
        answers = {d.ref: self._offers.of(d.image, found.machine) for d in wanted if found.machine}
        offers = {ref: offer for ref, (offer, _) in answers.items() if offer}
        return replace(
            found,
            requires={**found.requires, **{ref: requirement(offer.env) for ref, offer in offers.items()}},
            made_for={**found.made_for, **{ref: offer.architecture for ref, offer in offers.items()}},
            downloads={ref: offer.download_bytes for ref, offer in offers.items()},
            asking=frozenset(ref for ref, (_, awaited) in answers.items() if awaited),
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
        served = {container for d in desired for container in d.run.ready_containers}
        return {
            c.id: Target(url=url_of(c.port), probe=labels.probe, was_ready=c.id in served)
            for c, labels in ours
            if c.state in ("running", "paused") and c.port
        }

    async def _read_log_tails(self, ours: list[tuple[Container, Labels]]) -> Mapping[str, str]:
        """Of those that exited, which is read once, and of those that stopped answering, which may still say more."""
        exited = [c.id for c, _ in ours if c.state in ("exited", "dead")]
        failing = [c.id for c, _ in ours if c.state == "running" and self._prober.health(c.id).state == "failing"]
        self._log_tails = {key: tail for key, tail in self._log_tails.items() if key in exited}
        for key in exited:
            if key not in self._log_tails:
                self._log_tails[key] = await self._log_tail(key)
        return self._log_tails | {key: await self._log_tail(key) for key in failing}

    async def _log_tail(self, container: str) -> str:
        """Nothing where there is nothing to be had: a container on its way out has no logs any more."""
        try:
            return await self._containers.log_tail(container, LOG_LINES)
        except DockerUnavailable:
            raise
        except HostError:
            return ""

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
            gpu_ids=labels.gpus,
            busy=c.port is not None and self._is_busy(url_of(c.port)),
            health=_health(c, self._prober.health(c.id)),
            log_tail=tails.get(c.id, ""),
        )

    async def _read_images(self, desired: list[Desired]) -> Mapping[Ref, Image | None]:
        return {d.ref: await self._image(d) for d in desired}

    async def _image(self, d: Desired) -> Image | None:
        """None where Docker refuses the name as well: the pull meets the same, and there it has consequences."""
        try:
            return await self._containers.image(resolved_image(d))
        except DockerUnavailable:
            raise
        except HostError:
            return None

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
            problem = await asyncio.to_thread(weights_problem, directory)
            return None if problem else Located(source=str(directory))
        snapshot = await asyncio.to_thread(self._weights.present, repo_of(weights))
        if snapshot is None:
            return None
        subdirectory = snapshot.path.removeprefix(snapshot.repo_dir).strip("/")
        return Located(source=snapshot.repo_dir, subdirectory=subdirectory, commit=snapshot.commit)


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
    return d.run.image_id or d.image


def _given_up(d: Desired) -> bool:
    return d.run.failure is not None and d.run.failure.final


def _runs(d: Desired, instances: tuple[Instance, ...]) -> bool:
    return any(i.ref == d.ref and i.hash == d.hash and i.state == "running" for i in instances)


def _health(container: Container, found: Health) -> Health:
    """What was found by probing, unless the state of the container says more, and says it at once."""
    detail = SILENT.get(container.state)
    if detail is None:
        return found
    since = found.since if found.state == "failing" else time.time()
    return replace(found, state="failing", detail=detail.format(name=container.name), since=since)
