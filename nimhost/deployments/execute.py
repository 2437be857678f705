"""Carrying out one action. A failure becomes an outcome; what it means is the plan's business."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import threading
from collections.abc import Callable
from pathlib import Path

import msgspec
from msgspec import Struct

from nimhost.config import Settings
from nimhost.deployments.actions import Halt, Prepare, Remove, Start
from nimhost.deployments.desired import Desired
from nimhost.deployments.labels import Labels, container_name
from nimhost.deployments.logins import NGC_REGISTRY, Secret, ngc_login
from nimhost.deployments.observe import Observer, resolved_image
from nimhost.deployments.repos import repo_of
from nimhost.deployments.resolve import Resolver
from nimhost.deployments.storage import HubWeights
from nimhost.engines.order import HostFacts
from nimhost.engines.share import with_utilization
from nimhost.engines.spec import ADAPTERS_DIR, ContainerSpec, Mount
from nimhost.errors import DiskFull, HostError, ImageNotFound, NimhostError, NotFound, RegistryDenied, WeightsMissing
from nimhost.host.containers import GPU_ULIMITS, Containers, Launch, PullProgress
from nimhost.host.weights import Weights, WeightsProgress
from nimhost.host.weights.cache import write_atomically
from nimhost.refs import Ref
from nimhost.runs import Run


class Progress(Struct, frozen=True, kw_only=True):
    """How far the preparation of one deployment is. In memory only; None for what is not being fetched."""

    image: PullProgress | None = None
    weights: WeightsProgress | None = None


class Executor:
    """Effects on Docker and the weights cache. `on_progress` hears of every step, on the loop."""

    def __init__(
        self,
        *,
        settings: Settings,
        host: HostFacts,
        containers: Containers,
        weights: Weights,
        observer: Observer,
        resolver: Resolver,
        secret: Secret,
        on_progress: Callable[[Ref, Progress], None],
    ) -> None:
        self._settings = settings
        self._host = host
        self._containers = containers
        self._weights = weights
        self._observer = observer
        self._resolver = resolver
        self._secret = secret
        self._on_progress = on_progress
        self._progress: dict[Ref, Progress] = {}

    async def prepare(self, action: Prepare, d: Desired) -> None:
        """Image and weights side by side; the first failure stops the other and is the one that is raised."""
        jobs = []
        if action.image:
            jobs.append(self._pull(d))
        if action.weights:
            jobs.append(self._fetch(d))
        try:
            async with asyncio.TaskGroup() as group:
                for job in jobs:
                    group.create_task(job)
        except* NimhostError as failures:
            raise _first(failures) from None
        finally:
            self._progress.pop(d.ref, None)

    async def resolve(self, d: Desired) -> Run:
        """What the wish becomes on this machine; the answer of its first start is kept for all later ones.

        Raises ImageNotFound or WeightsMissing when something went away since it was prepared.
        """
        run = d.run
        if run.resolved is not None:
            return run
        located = await self._observer.locate(d.weights) if d.weights else None
        if d.weights and located is None:
            raise WeightsMissing("The model weights are no longer on this machine.")
        image = await self._containers.image(resolved_image(d))
        if image is None:
            raise ImageNotFound(f"Image {d.image} is no longer on this machine.")
        assert d.order is not None
        spec = await self._resolver.resolve(d.order, located)
        spec = msgspec.structs.replace(spec, user=spec.user_in(image.user))
        return msgspec.structs.replace(
            run,
            image_id=image.id,
            commit=located.commit if located else None,
            resolved=msgspec.to_builtins(spec),
        )

    async def start(self, action: Start, d: Desired, run: Run, owner: str, epoch: int) -> None:
        spec = msgspec.convert(run.resolved, ContainerSpec)
        if action.utilization is not None:
            spec = with_utilization(spec, action.utilization)
        await asyncio.to_thread(_make_directories, spec)
        spec = await asyncio.to_thread(_write_files, spec, Path(self._host.files_dir))
        labels = Labels(
            owner=owner,
            deployment=d.ref,
            version=d.entity.version,
            hash=d.hash,
            gpus=action.gpu_ids,
            probe=spec.probe,
            epoch=epoch,
            share_bytes=d.share_bytes,
        )
        docker = self._settings.docker
        launch = Launch(
            spec=spec,
            name=container_name(d.ref, d.hash, owner),
            image_id=run.image_id,
            env=await self._secret_env(spec),
            labels=labels.encode(),
            gpu_ids=action.gpu_ids,
            ulimits={**(GPU_ULIMITS if spec.gpus else {}), **docker.ulimits},
        )
        await self._containers.run(launch)

    async def remove(self, action: Remove) -> None:
        for container in action.containers:
            if not action.at_once:
                await self._containers.stop(container, self._settings.docker.stop_timeout_s)
            await self._containers.remove(container)

    async def halt(self, action: Halt) -> None:
        await self._containers.stop(action.container, self._settings.docker.stop_timeout_s)

    async def _secret_env(self, spec: ContainerSpec) -> dict[str, str]:
        """Secrets that exist; an engine that needs one that does not says so itself."""
        found = {}
        for variable, ref in spec.secret_env.items():
            try:
                found[variable] = await self._secret(Ref(*ref.split("/", 1)))
            except NotFound:
                continue
        return found

    async def _pull(self, d: Desired) -> None:
        auth = await ngc_login(d.image, self._secret)
        stall_timeout_s = self._settings.docker.pull_stall_timeout_s
        try:
            await self._containers.pull(d.image, auth, lambda step: self._report(d.ref, image=step), stall_timeout_s)
        except RegistryDenied as error:
            if not d.image.startswith(f"{NGC_REGISTRY}/"):
                raise
            raise _denied_by_ngc(d.image, auth is not None) from error

    async def _fetch(self, d: Desired) -> None:
        assert d.weights is not None
        if not isinstance(d.weights, HubWeights):
            problem = await asyncio.to_thread(self._observer.local_problem, d.weights)
            raise WeightsMissing(problem or f"The weights of {d.ref} came and went.")
        token = await self._secret(d.weights.token_secret) if d.weights.token_secret else None
        await self._weights.fetch(repo_of(d.weights), token, lambda step: self._report(d.ref, weights=step))

    def _report(self, ref: Ref, **step: PullProgress | WeightsProgress) -> None:
        progress = msgspec.structs.replace(self._progress.get(ref, Progress()), **step)
        self._progress[ref] = progress
        self._on_progress(ref, progress)

    def progress(self, ref: Ref) -> Progress | None:
        return self._progress.get(ref)


def _denied_by_ngc(image: str, with_key: bool) -> RegistryDenied:
    """NGC does not say whether the key, the licence or the name is wrong; whether there was a key at all, we know."""
    if not with_key:
        return RegistryDenied(
            f"Image {image}: {NGC_REGISTRY} wants an NGC API key, and there is none.",
            "nimhost secrets create ngc-api-key --workspace system --from-file - (keys are made at "
            "https://org.ngc.nvidia.com/setup/api-keys)",
        )
    return RegistryDenied(
        f"Image {image}: the NGC API key (secret system/ngc-api-key) has no access to {image}, or it does not exist.",
        "Check the name and the tag at https://catalog.ngc.nvidia.com and accept its licence there with the account of "
        "the key; another key: nimhost secrets update ngc-api-key --workspace system --from-file -",
    )


def _make_directories(spec: ContainerSpec) -> None:
    """Directories of ours. NIM runs as a user of its own, so anybody may write where an engine writes."""
    for mount in spec.mounts:
        if (mount.target == ADAPTERS_DIR or not mount.read_only) and not Path(mount.source).exists():
            try:
                _make_directory(Path(mount.source), 0o755 if mount.read_only else 0o777)
            except OSError as error:
                raise _refusal(f"Cannot make the directory {mount.source}", error) from None


_making = threading.Lock()


def _make_directory(path: Path, mode: int) -> None:
    """Under its name only once it has its mode: one that is there is left as it is."""
    fresh = path.with_name(f".{path.name}.new")
    with _making:  # engines that share it may start at once
        if path.is_dir():
            return
        fresh.mkdir(parents=True, exist_ok=True)
        fresh.chmod(mode)
        try:
            fresh.rename(path)
        except OSError:
            if not path.is_dir():
                raise
            fresh.rmdir()  # whoever made it meanwhile has put something into it


def _write_files(spec: ContainerSpec, directory: Path) -> ContainerSpec:
    """The spec with its files as mounts. Named by their content: a file is never changed under an engine."""
    mounts = []
    for target, text in sorted(spec.files.items()):
        content = text.encode()
        path = directory / hashlib.sha256(content).hexdigest()[:16] / Path(target).name
        try:
            if not path.is_file() or path.read_bytes() != content:
                write_atomically(path, content)
            path.chmod(0o644)
        except OSError as error:
            raise _refusal(f"Cannot write the file {path}", error) from None
        mounts.append(Mount(str(path), target))
    return msgspec.structs.replace(spec, mounts=(*spec.mounts, *mounts))


def _refusal(what: str, error: OSError) -> HostError:
    cls = DiskFull if error.errno in (errno.ENOSPC, errno.EDQUOT) else HostError
    return cls(f"{what}: {error.strerror}.", "See the data directory: its disk, and who may write there.")


def _first(failures: BaseExceptionGroup[NimhostError]) -> NimhostError:
    error: BaseException = failures
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, NimhostError)
    return error
