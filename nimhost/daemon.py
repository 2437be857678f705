"""The daemon: opens everything in order, serves, closes it in reverse. The only place that knows all the parts."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import uvicorn
import uvloop

from nimhost import __version__
from nimhost.api.app import control_plane, entry
from nimhost.api.parts import Parts
from nimhost.config import Settings, data_dir, load
from nimhost.deployments.desired import join
from nimhost.deployments.discovery import Discovery, Question
from nimhost.deployments.execute import Executor
from nimhost.deployments.observe import Observer
from nimhost.deployments.observed import Observed
from nimhost.deployments.plan import Verdict
from nimhost.deployments.preflight import check_wish
from nimhost.deployments.probe import Prober
from nimhost.deployments.reconciler import Reconciler
from nimhost.deployments.retry import Limits
from nimhost.deployments.routing import Key, provider_key, route_table
from nimhost.engines.order import HostFacts
from nimhost.entities import Deployment, DeploymentStatus, Entity
from nimhost.errors import ConfigError, NimhostError, NotFound, StartError
from nimhost.gateway.proxy import Gateway
from nimhost.host.containers import DockerContainers
from nimhost.host.files import FileStorage
from nimhost.host.gpus import Gpus, NvmlGpus, SimulatedGpus, limited
from nimhost.host.lock import lock_directory
from nimhost.host.vault import Vault
from nimhost.host.weights import Weights, cache_dir_from
from nimhost.refs import Ref
from nimhost.store import Store
from nimhost.view import View

log = logging.getLogger(__name__)

NGC_KEY = Ref("system", "ngc-api-key")


class Daemon:
    """The parts of a running nimhost, wired together."""

    def __init__(self, settings: Settings, directory: Path, store: Store, vault: Vault) -> None:
        self.settings = settings
        self.store = store
        self.vault = vault
        self.host = host_facts(settings, directory)
        self.files = FileStorage(directory / "filesets")
        self.gateway = Gateway(settings.gateway)
        self.containers = DockerContainers(settings.docker.host or None)
        self.gpus: Gpus = SimulatedGpus(settings.gpus.simulated) if settings.gpus.simulated else NvmlGpus()
        cache_dir = Path(settings.weights.cache_dir).expanduser() if settings.weights.cache_dir else None
        self.weights = Weights(
            cache_dir or cache_dir_from(os.environ), settings.weights.endpoint, settings.weights.offline
        )
        self.prober = Prober(self._wake)
        self.discovery = Discovery(store, self._wake)
        self.observer = Observer(
            containers=self.containers,
            gpus=self.gpus,
            devices=settings.gpus.devices,
            weights=self.weights,
            prober=self.prober,
            owner=store.owner,
            files_root=self.files.root,
        )
        self.view = View(containers=self.containers, gpus=self.gpus, observer=self.observer)
        self.executor = Executor(
            settings=settings,
            host=self.host,
            containers=self.containers,
            weights=self.weights,
            observer=self.observer,
            secret=self.secret,
            on_progress=self.view.progressed,
        )
        self.reconciler = Reconciler(
            store=store,
            observer=self.observer,
            executor=self.executor,
            containers=self.containers,
            host=self.host,
            limits=limits(settings),
            on_tick=self._on_tick,
        )
        self.view.executor, self.view.reconciler = self.executor, self.reconciler
        self.first_look = asyncio.Event()
        self._published: object = None

    def app(self) -> object:
        parts = Parts(
            store=self.store,
            vault=self.vault,
            files=self.files,
            settings=self.settings,
            host=self.view,
            check_deployment=self.check_deployment,
        )
        return entry(control_plane(parts), self.gateway, self.settings)

    async def run(self) -> None:
        """Reconcile until cancelled."""
        async with self.store.transaction() as tx:
            self.observer.epoch = int(await tx.meta("epoch") or 0)
        await self.reconciler.run()

    async def close(self) -> None:
        await self.discovery.close()
        await self.prober.close()
        await self.gateway.close()
        await self.weights.close()
        await self.gpus.close()
        await self.containers.close()
        self.files.close()

    def _wake(self) -> None:
        self.reconciler.wake()

    async def secret(self, ref: Ref) -> str:
        """The value of a secret, for those who need it to act. Raises NotFound."""
        if ref == NGC_KEY and (key := os.environ.get("NGC_API_KEY")):
            return key
        entity = await self.store.get("secrets", *ref)
        return self.vault.open(entity.wish.value, str(ref))

    async def check_deployment(self, config: Entity) -> None:
        """Refuse what this machine can never run. Raises BadRequest, naming the field."""
        rows = {(e.kind, e.workspace, e.name): e for kind in ("models", "filesets") for e in await self.store.all(kind)}
        wanted = Entity(
            kind="deployments", id="", workspace=config.workspace, name=config.name, created_at="", updated_at="",
            wish=Deployment(config=config.name), status=DeploymentStatus(),
        )  # fmt: skip
        desired = join(wanted, config.wish, lambda *key: rows.get(key), self.host)
        problem = await asyncio.to_thread(self.observer.local_problem, desired.weights)
        facts = limited(await self.gpus.read(), self.settings.gpus.devices)
        check_wish(desired, len(facts.gpus), problem)

    async def _on_tick(self, verdicts: tuple[Verdict, ...], observed: Observed) -> None:
        """Routes and discovery follow the rows and the verdicts; nothing is made anew when neither changed."""
        self.view.saw(verdicts, observed)
        state = (self.store.revision, [(v.desired.ref, v.status, v.message, v.instance) for v in verdicts])
        if state != self._published:
            providers = await self.store.all("providers")
            keys = {Ref(p.workspace, p.name): await self._key(p) for p in providers}
            self.gateway.table = route_table(
                providers, await self.store.all("models"), await self.store.all("workspaces"), verdicts, keys
            )
            self.discovery.watch(
                Question(provider=p, headers=key.headers + _extra_headers(p), problem=key.problem)
                for p in providers
                if p.wish.model_deployment_id is None
                for key in [keys[Ref(p.workspace, p.name)]]
            )
            self._published = state
        if not self.first_look.is_set():
            _say(_findings(observed, self.observer, verdicts))
            self.first_look.set()

    async def _key(self, provider: Entity) -> Key:
        name = provider.wish.api_key_secret_name
        try:
            secret = await self.secret(Ref(provider.workspace, name)) if name else None
        except NotFound:
            secret = None
        except NimhostError as error:
            return Key(problem=f"{error.message} {error.hint or ''}".strip())
        return provider_key(provider.wish, secret)


def host_facts(settings: Settings, directory: Path) -> HostFacts:
    return HostFacts(
        nim_image=settings.engines.nim.image,
        vllm_image=settings.engines.vllm.image,
        nim_cache_dir=str(directory / "nim-cache"),
        shm_bytes=int(settings.docker.shm_gib * 2**30),
    )


def limits(settings: Settings) -> Limits:
    wish = settings.deployments
    return Limits(
        start_timeout_s=wish.start_timeout_s,
        start_limit=wish.start_limit,
        restart_limit=wish.restart_limit,
        restart_backoff_s=wish.restart_backoff_s,
        unhealthy_restart_s=wish.unhealthy_restart_s,
    )


def _extra_headers(provider: Entity) -> tuple[tuple[str, str], ...]:
    wish = provider.wish
    return tuple(((wish.default_extra_headers or {}) | (wish.required_extra_headers or {})).items())


# --- the process ---------------------------------------------------------------------------------------------------


def run(config_file: str | None, overrides: Mapping[str, object]) -> int:
    """`nimhost serve`: until SIGTERM or SIGINT. Exit code 0; 1 when it cannot start, 2 when its settings are wrong."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    for chatty in ("httpx", "uvicorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        settings = load(config_file, overrides)
        directory = data_dir(settings)
        lock_directory(directory)
        listener = listen(settings)
        uvloop.run(_serve(settings, directory, listener))
    except NimhostError as error:
        sys.stderr.write(f"Error: {error.message}\n" + (f"Hint: {error.hint}\n" if error.hint else ""))
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def listen(settings: Settings) -> socket.socket:
    """The listening socket. Raises StartError when the address cannot be had."""
    host, port = settings.server.host, settings.server.port
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if not host_is_loopback(str(address[0])):
            raise StartError(
                f"{host} can be reached from other machines, and nimhost has no access control for them yet.",
                "Listen on 127.0.0.1, and reach it from elsewhere with: ssh -L 8080:127.0.0.1:8080 HOST",
            )
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(2048)
    except OSError as error:
        raise StartError(
            f"Cannot listen on {host}:{port}: {error.strerror}.", "Choose another port: nimhost serve --port 8081"
        ) from None
    return listener


def host_is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")


async def _serve(settings: Settings, directory: Path, listener: socket.socket) -> None:
    store = await Store.open(directory / "nimhost.db")
    try:
        sealed = [(e.wish.value, e.ref) for e in await store.all("secrets")]
        vault = Vault.load(directory / "key", sealed)
        daemon = Daemon(settings, directory, store, vault)
        try:
            await _until_stopped(daemon, listener)
        finally:
            await daemon.close()
    finally:
        await store.close()


async def _until_stopped(daemon: Daemon, listener: socket.socket) -> None:
    server = _Server(
        uvicorn.Config(
            daemon.app(),  # type: ignore[arg-type]
            http="httptools",
            loop="none",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=round(daemon.settings.server.drain_timeout_s),
        )
    )
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.stop)
    host, port = listener.getsockname()[:2]
    _say([f"nimhost {__version__} listens on http://{host}:{port}"])
    reconciling = asyncio.create_task(daemon.run(), name="reconciler")
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="server")
    try:
        await asyncio.wait((reconciling, serving), return_when=asyncio.FIRST_COMPLETED)
        if reconciling.done():  # it never ends by itself: a broken supervisor is no reason to pretend
            server.should_exit = True
            await serving
            reconciling.result()
    finally:
        reconciling.cancel()
        await asyncio.gather(reconciling, serving, return_exceptions=True)


class _Server(uvicorn.Server):
    """The first signal drains, the second one forces."""

    def stop(self) -> None:
        self.force_exit = self.should_exit
        if not self.should_exit:
            _say(["Stopping: letting replies end. Engines keep running. Once more to force."])
        self.should_exit = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def _findings(observed: Observed, observer: Observer, verdicts: tuple[Verdict, ...]) -> list[str]:
    """The rest of the banner: what was found."""
    if observed.docker_problem:
        docker = f"Docker: {observed.docker_problem}\n        Without it there are only external providers."
    else:
        docker = "Docker: connected"
    gpus = [f"GPU {g.index}: {g.name}, {g.memory_bytes / 2**30:.0f} GiB, {g.uuid}" for g in observer.gpus]
    adopted = [str(v.desired.ref) for v in verdicts if any(i.ref == v.desired.ref for i in observed.instances)]
    return [
        docker,
        *(gpus or [f"GPUs: none. {observed.gpu_problem or ''}".rstrip()]),
        f"Adopted: {', '.join(adopted)}" if adopted else f"Deployments: {len(verdicts)}, none running",
    ]


def _say(lines: list[str]) -> None:
    """The banner, on stdout: for the person who started it."""
    for line in lines:
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
