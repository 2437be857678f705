"""The daemon: opens everything in order, serves, closes it in reverse. The only place that knows all the parts."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import uvloop

from nimhost import __version__
from nimhost.api.access import TokenTable, is_loopback
from nimhost.api.app import control_plane, entry
from nimhost.api.parts import Parts
from nimhost.api.rotation import sealed_in, sealed_rows
from nimhost.config import Settings, data_dir, load, ngc_api_key
from nimhost.deployments.adapter_copies import AdapterCopies
from nimhost.deployments.discovery import Discovery
from nimhost.deployments.execute import Executor
from nimhost.deployments.filesets import Filesets
from nimhost.deployments.loading import Loader
from nimhost.deployments.observe import Observer
from nimhost.deployments.observed import Observed
from nimhost.deployments.offers import Offers, asking
from nimhost.deployments.preview import Previews
from nimhost.deployments.probe import Prober
from nimhost.deployments.pulls import Pulls
from nimhost.deployments.reconciler import Reconciler
from nimhost.deployments.resolve import Resolver
from nimhost.deployments.retry import Limits
from nimhost.deployments.router import Router
from nimhost.deployments.situation import Verdict
from nimhost.deployments.specs import Specs
from nimhost.deployments.weights_stock import Stock
from nimhost.engines.order import HostFacts
from nimhost.entities import Entity
from nimhost.errors import ConfigError, NimhostError
from nimhost.gateway.memory import settle
from nimhost.gateway.proxy import Gateway
from nimhost.host.adapter_files import AdapterFiles
from nimhost.host.containers import Containers, DockerContainers
from nimhost.host.files import FileStorage
from nimhost.host.gpus import Gpus, NvmlGpus, SimulatedGpus
from nimhost.host.hub_files import HubFiles
from nimhost.host.lock import lock_directory
from nimhost.host.registry import Registries
from nimhost.host.vault import Vault
from nimhost.host.weights import Weights, cache_dir_from
from nimhost.kinds import KINDS
from nimhost.listening import Server, listen
from nimhost.loopwatch import watching
from nimhost.refs import NGC_KEY, Ref
from nimhost.startup import preload, seed, sweep_container_files, sweep_files
from nimhost.store import Store, now
from nimhost.store.tokens import insert_token, stored_tokens
from nimhost.streams import STDOUT, Lines, Log, fill_streams
from nimhost.tokens import RANDOM_BYTES, Scope, Token, parse_entries, remember, spell
from nimhost.view import View, findings

log = logging.getLogger(__name__)


class Daemon:
    """The parts of a running nimhost, wired together."""

    def __init__(
        self,
        settings: Settings,
        directory: Path,
        store: Store,
        vault: Vault,
        containers: Containers,
        gpus: Gpus,
        tokens: TokenTable | None = None,
        registries: Registries | None = None,
    ) -> None:
        """`registries`: None asks none what an image is before it is pulled."""
        self.settings = settings
        self.store = store
        self.vault = vault
        self.tokens = tokens or TokenTable()
        self.host = host_facts(settings, directory)
        self.files = FileStorage(directory / "filesets")
        self.gateway = Gateway(settings.gateway)
        self.containers = containers
        self.gpus = gpus
        self.weights = weights_of(settings)
        self.prober = Prober(self._wake)
        self.discovery = Discovery(store, self._wake)
        self.offers = Offers(asking(registries, containers, self.secret) if registries else None, self._wake)
        self.observer = self._make_observer()
        filesets = Filesets(self.weights, self.files.root, self.secret)
        self.specs = Specs(store, filesets, plugins=settings.models.tool_call_plugin.enabled)
        self.previews = Previews(
            store=store, observer=self.observer, gpus=self.gpus, devices=settings.gpus.devices, filesets=filesets,
            host=self.host,
        )  # fmt: skip
        self.resolver = Resolver(store, filesets, self.host)
        self.view = View(containers=self.containers, gpus=self.gpus, observer=self.observer)
        self.executor = self._make_executor()
        self.reconciler = self._make_reconciler()
        self.pulls = Pulls(self.weights, store, self.secret)
        self.stock = Stock(self.weights, store, self.pulls, self.reconciler.read_desired, self.reconciler.room_made)
        self.view.executor, self.view.reconciler = self.executor, self.reconciler
        self.gateway.on_idle = self._wake
        copies = AdapterCopies(
            store, filesets, self.weights, AdapterFiles(Path(self.host.loras_dir)), self.files.root, self.secret
        )
        self.loader = Loader(store, copies, self.prober, self._wake)
        self.router = Router(store, self.gateway, self.loader, self.secret, self.reconciler.read_desired)
        self.first_look = asyncio.Event()
        self._published: object = None

    def _make_observer(self) -> Observer:
        return Observer(
            containers=self.containers, gpus=self.gpus, devices=self.settings.gpus.devices, weights=self.weights,
            prober=self.prober, owner=self.store.owner, files_root=self.files.root, is_busy=self.gateway.is_busy,
            offers=self.offers,
        )  # fmt: skip

    def _make_executor(self) -> Executor:
        return Executor(
            settings=self.settings, host=self.host, containers=self.containers, weights=self.weights,
            observer=self.observer, resolver=self.resolver, secret=self.secret, on_progress=self.view.progressed,
        )  # fmt: skip

    def _make_reconciler(self) -> Reconciler:
        return Reconciler(
            store=self.store,
            observer=self.observer,
            executor=self.executor,
            containers=self.containers,
            host=self.host,
            limits=limits(self.settings),
            on_tick=self._on_tick,
        )

    def app(self, loopback: bool | None = None) -> object:
        parts = Parts(
            store=self.store,
            vault=self.vault,
            files=self.files,
            settings=self.settings,
            host=self.view,
            check_deployment=self.check_deployment,
            hub=HubFiles(self.weights.cache_dir, self.weights.endpoint, self.weights.offline),
            specs=self.specs,
            previews=self.previews,
            stock=self.stock,
            tokens=self.tokens,
            gateway=self.gateway,
            adapters=self.loader,
            follow=self.router.follow,
        )
        control, on_refused = control_plane(parts), self.gateway.traffic.end
        return entry(control, self.gateway, self.settings, self.tokens, loopback=loopback, on_refused=on_refused)

    async def run(self) -> None:
        """Reconcile until cancelled."""
        await self.files.open()
        await sweep_files(self.files, self.store)
        await self.pulls.resume()
        await self.specs.start()
        self.loader.start()
        await self.reconciler.run()

    async def close(self) -> None:
        await self.specs.close()
        await self.loader.close()
        await self.offers.close()
        await self.discovery.close()
        await self.prober.close()
        await self.gateway.close()
        await self.pulls.close()
        await self.weights.close()
        await self.gpus.close()
        await self.containers.close()
        self.files.close()

    def _wake(self) -> None:
        self.reconciler.wake()

    async def secret(self, ref: Ref) -> str:
        """The value of a secret, for those who need it to act. Raises NotFound."""
        entity = await self.store.find("secrets", *ref)
        if entity is None and ref == NGC_KEY and (key := ngc_api_key()):
            return key
        if entity is None:
            raise KINDS["secrets"].not_found(*ref)
        return self.vault.open(entity.wish.value, str(ref))

    async def check_deployment(self, config: Entity, force: bool = False) -> None:
        """Refuse what this machine can never run. Raises BadRequest, naming the field."""
        desired = await self.previews.desired(config)
        await self.previews.check(desired, force)
        if desired.order is not None:
            await self.resolver.check(desired.order)

    async def _on_tick(self, verdicts: tuple[Verdict, ...], observed: Observed) -> None:
        """Routes and discovery follow the rows and the verdicts; nothing is made anew when neither changed."""
        self.view.saw(verdicts, observed)
        seen = [(v.desired.ref, v.status, v.message, v.instance) for v in verdicts]
        state = (self.store.revision, self.loader.revision, seen)
        if state != self._published:
            self.discovery.watch(await self.router.route(verdicts))
            self._published = state
        self.loader.saw(verdicts, observed, state[:2])
        if not self.first_look.is_set():
            await sweep_container_files(Path(self.host.files_dir), self.containers)
            _say(findings(observed, self.observer, verdicts))
            self.first_look.set()


def host_facts(settings: Settings, directory: Path) -> HostFacts:
    return HostFacts(
        nim_image=settings.engines.nim.image,
        vllm_image=settings.engines.vllm.image,
        nim_cache_dir=str(directory / "nim-cache"),
        loras_dir=str(directory / "loras"),
        files_dir=str(directory / "container-files"),
        shm_bytes=int(settings.docker.shm_gib * 2**30),
    )


def weights_of(settings: Settings) -> Weights:
    wish = settings.weights
    cache_dir = Path(wish.cache_dir).expanduser() if wish.cache_dir else cache_dir_from(os.environ)
    return Weights(cache_dir, wish.endpoint, wish.offline)


def limits(settings: Settings) -> Limits:
    wish = settings.deployments
    return Limits(
        start_timeout_s=wish.start_timeout_s,
        start_limit=wish.start_limit,
        restart_limit=wish.restart_limit,
        restart_backoff_s=wish.restart_backoff_s,
        unhealthy_restart_s=wish.unhealthy_restart_s,
        drain_timeout_s=wish.drain_timeout_s,
    )


# --- the process ---------------------------------------------------------------------------------------------------


def run(config_file: str | None, overrides: Mapping[str, object]) -> int:
    """`nimhost serve`: until SIGTERM or SIGINT. Exit code 0; 1 when it cannot start, 2 when its settings are wrong."""
    fill_streams()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", handlers=[Log()])
    for chatty in ("httpx", "uvicorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        settings = load(config_file, overrides)
        directory = data_dir(settings)
        lock_directory(directory)
        uvloop.run(_serve(settings, directory))
    except NimhostError as error:
        sys.stderr.write(f"Error: {error.message}\n" + (f"Hint: {error.hint}\n" if error.hint else ""))
        return 2 if isinstance(error, ConfigError) else 1
    return 0


def create_token(name: str, scopes: Sequence[Scope]) -> tuple[Token, str, Path]:
    """Makes an API token while no daemon runs: whoever may write the data directory is the administrator.

    Returns it, how it is spelt, and the data directory. Raises StartError, ConfigError, AlreadyExists.
    """
    directory = data_dir(load())
    lock = lock_directory(directory)
    try:
        text = spell(secrets.token_bytes(RANDOM_BYTES))
        token = remember(name, scopes, text, now())
        asyncio.run(_insert_token(directory, token))
    finally:
        os.close(lock)
    return token, text, directory


async def _insert_token(directory: Path, token: Token) -> None:
    store = await Store.open(directory / "nimhost.db")
    try:
        async with store.transaction() as tx:
            await insert_token(tx, token)
    finally:
        await store.close()


async def _serve(settings: Settings, directory: Path) -> None:
    fixed = parse_entries(settings.server.api_tokens)
    store = await Store.open(directory / "nimhost.db")
    try:
        tokens = TokenTable(fixed, await stored_tokens(store))
        listener = listen(settings.server, has_tokens=bool(tokens.all()))
        sealed = [sealed_in(row) for row in await sealed_rows(store)]
        vault = Vault.load(directory / "key", sealed, os.environ.pop("NIMHOST_ENCRYPTION_KEY", None))
        await seed(store)
        containers = DockerContainers(settings.docker.host or None)
        gpus = SimulatedGpus(settings.gpus.simulated) if settings.gpus.simulated else NvmlGpus()
        registries = None if settings.weights.offline else Registries()
        daemon = Daemon(settings, directory, store, vault, containers, gpus, tokens, registries)
        try:
            await daemon.router.recall()
            preload()
            settle()
            with watching():
                await _until_stopped(daemon, listener)
        finally:
            await daemon.close()
    finally:
        await store.close()


async def _until_stopped(daemon: Daemon, listener: socket.socket) -> None:
    address = listener.getsockname()
    app = daemon.app(loopback=is_loopback(address[0]))
    server = Server(app, daemon.settings.server.drain_timeout_s, on_stop=lambda: _say([_STOPPING]))
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, server.stop)
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # it is under nohup
        loop.add_signal_handler(signal.SIGHUP, server.hang_up)
    host = f"[{address[0]}]" if ":" in address[0] else address[0]
    _say([f"nimhost {__version__} listens on http://{host}:{address[1]}"])
    reconciling = asyncio.create_task(daemon.run(), name="reconciler")
    serving = asyncio.create_task(server.serve(sockets=[listener]), name="server")
    try:
        await asyncio.wait((reconciling, serving), return_when=asyncio.FIRST_COMPLETED)
        if reconciling.done():  # it never ends by itself: a broken supervisor is no reason to pretend
            server.stop()
            await serving
            reconciling.result()
    finally:
        reconciling.cancel()
        await asyncio.gather(reconciling, serving, return_exceptions=True)


_STOPPING = "Stopping: letting replies end. Engines keep running. Once more to force."


def _say(lines: list[str]) -> None:
    """The banner, on stdout: for the person who started it."""
    _stdout().put("\n".join(lines))


@cache
def _stdout() -> Lines:
    return Lines(STDOUT)
