"""What external providers serve: asked when a provider or its secret changes, then every few minutes."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Iterable

import httpx
import msgspec
from msgspec import Struct

from nimhost.deployments.model_list import ListedModel, read_model_page
from nimhost.deployments.publish import NO_MODELS, entity_for, write_provider
from nimhost.entities import Entity, Provider, ProviderStatus, ServedModel
from nimhost.errors import NimhostError
from nimhost.store import Store

log = logging.getLogger(__name__)

STEADY_INTERVAL_S = 300.0
RETRY_S = (2.0, 60.0)
TIMEOUT_S = 15.0
MOST_PAGES = 50
MOST_BYTES = 2**24
"""Of one page. What is longer is no list of models."""
PAGE_SIZE = 1000
"""Asked for once a server has shown that it lists page by page: Anthropic, 20 models at a time by default."""
_LOOP_DETECTED = 508


class Question(Struct, frozen=True, kw_only=True):
    """A provider to ask, with its key put in. `problem`: why it cannot be asked at all."""

    provider: Entity
    headers: tuple[tuple[str, str], ...] = ()
    problem: str | None = None

    def __repr__(self) -> str:  # the headers hold a key
        return f"Question({self.provider.ref})"

    @property
    def url(self) -> str:
        base = self.provider.wish.host_url.rstrip("/")
        return f"{base.removesuffix('/v1')}/v1/models"


class Discovery:
    """One task per external provider. `on_change` is called on the loop when a status was written."""

    def __init__(self, store: Store, on_change: Callable[[], None]) -> None:
        self._store = store
        self._on_change = on_change
        self._tasks: dict[str, tuple[Question, asyncio.Task[None]]] = {}
        self._found: dict[str, str] = {}
        """The status that was last found out, by the id of the provider."""
        self._client: httpx.AsyncClient | None = None
        self._opening = asyncio.Lock()

    def watch(self, questions: Iterable[Question]) -> None:
        """Ask exactly these from now on; one whose wish or key changed is asked again at once, and so is one that
        somebody else gave another status."""
        wanted = {q.provider.id: q for q in questions}
        for key, (question, task) in list(self._tasks.items()):
            if key not in wanted or not _same(question, wanted[key]) or self._is_contradicted(wanted[key].provider):
                task.cancel()
                del self._tasks[key]
                self._found.pop(key, None)
        for key, question in wanted.items():
            if key not in self._tasks:
                task = asyncio.create_task(self._follow(question), name=f"discovery {question.provider.ref}")
                self._tasks[key] = (question, task)

    def _is_contradicted(self, provider: Entity) -> bool:
        stored: str = provider.status.status
        return self._found.get(provider.id, stored) != stored

    async def close(self) -> None:
        tasks = [task for _, task in self._tasks.values()]
        self.watch(())
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._client is not None:
            await self._client.aclose()

    async def _follow(self, question: Question) -> None:
        pause_s = RETRY_S[0]
        while True:
            status = await self._ask(question)
            stored = await self._store_status(question, status)
            if stored:
                self._found[question.provider.id] = status.status
            if stored and question.problem is not None:
                return  # there is nothing to ask until the question changes
            if stored and status.status == "READY":
                pause_s = RETRY_S[0]
                await asyncio.sleep(STEADY_INTERVAL_S)
            else:
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, RETRY_S[1])

    async def _ask(self, question: Question) -> ProviderStatus:
        if question.problem is not None:
            return ProviderStatus(status="ERROR", status_message=question.problem)
        try:
            status_code, listed = await self._list(question)
        except TimeoutError:
            said = f"{question.url} did not answer within {TIMEOUT_S:g} s"
            return ProviderStatus(status="ERROR", status_message=said)
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            return ProviderStatus(status="ERROR", status_message=f"Cannot reach {question.url}: {_why(error)}")
        return judge(question.provider, question.url, status_code, listed)

    async def _list(self, question: Question) -> tuple[int, list[ListedModel] | None]:
        """The status of the last reply, and what all of its pages list; None: it gives no list."""
        listed = None
        query: dict[str, str] | None = None
        for _ in range(MOST_PAGES):
            status_code, body = await self._get(question, query)
            page = read_model_page(body) if status_code == 200 else None
            if page is None:
                break
            listed = [*(listed or ()), *page.models]
            if page.after is None:
                break
            query = {"limit": str(PAGE_SIZE), "after_id": page.after}
        return status_code, listed

    async def _get(self, question: Question, query: dict[str, str] | None) -> tuple[int, bytes]:
        """Status and body of a reply; nothing of a body that is too long. Raises TimeoutError for one without end."""
        client, body = await self._http(), bytearray()
        ask = client.stream("GET", question.url, params=query, headers=list(question.headers))
        async with asyncio.timeout(TIMEOUT_S), ask as reply:
            async for chunk in reply.aiter_bytes():
                body += chunk
                if len(body) > MOST_BYTES:
                    return reply.status_code, b""
        return reply.status_code, bytes(body)

    async def _http(self) -> httpx.AsyncClient:
        """Reaches what the gateway reaches: through no proxy of the environment, trusting whom the system trusts."""
        async with self._opening:
            if self._client is None:  # reading the system's certificates takes tens of milliseconds
                trust = await asyncio.to_thread(ssl.create_default_context)
                self._client = httpx.AsyncClient(timeout=TIMEOUT_S, trust_env=False, verify=trust)
            return self._client

    async def _store_status(self, question: Question, status: ProviderStatus) -> bool:
        """False: it could not be written, for lack of space or because the database was locked; later it may be."""
        try:
            await self._write(question, status)
        except NimhostError as error:
            log.warning("the status of provider %s is not stored: %s", question.provider.ref, error)
            return False
        return True

    async def _write(self, question: Question, status: ProviderStatus) -> None:
        async with self._store.transaction() as tx:
            provider = await tx.find("providers", question.provider.workspace, question.provider.name)
            if provider is None or provider.id != question.provider.id or provider.status == status:
                return
            if status.status == "ERROR":  # what it served is still its own: requests say why they cannot go there
                status = msgspec.structs.replace(status, served_models=provider.status.served_models)
            if provider.status == status:
                return
            await write_provider(tx, provider, status)
        self._on_change()


def judge(provider: Entity, url: str, status_code: int, listed: list[ListedModel] | None) -> ProviderStatus:
    """What an answer to `GET /v1/models` says about a provider. Pure. `listed`: None for what is no list of models."""
    wish: Provider = provider.wish
    if status_code in (401, 403):
        secret = wish.api_key_secret_name
        fix = f"update it with: nimhost secrets update {secret}" if secret else "it wants a key: api_key_secret_name"
        return ProviderStatus(status="ERROR", status_message=f"{url} refused the key (HTTP {status_code}); {fix}")
    if status_code == _LOOP_DETECTED:
        said = f"{url} leads back to this nimhost, which would ask itself for ever: set another host_url"
        return ProviderStatus(status="ERROR", status_message=said)
    if status_code != 200 and (status_code != 404 or listed):
        return ProviderStatus(status="ERROR", status_message=f"{url} answered HTTP {status_code}")
    if listed is None:
        return ProviderStatus(status="READY", status_message=NO_MODELS)
    ids = list(
        dict.fromkeys(item.id for item in listed if not item.parent)
    )  # the others are adapters of vLLM's: no models of their own
    enabled = ids if wish.enabled_models is None else [name for name in ids if name in wish.enabled_models]
    served = [
        ServedModel(model_entity_id=entity, served_model_name=name)
        for name in enabled
        if (entity := entity_for(name, provider.workspace)) is not None
    ]
    message = "" if enabled else f"None of enabled_models is among the {len(ids)} models that {url} lists"
    return ProviderStatus(status="READY", status_message=message, served_models=served)


def _same(a: Question, b: Question) -> bool:
    return (a.provider.generation, a.headers, a.problem) == (b.provider.generation, b.headers, b.problem)


def _why(error: Exception) -> str:
    return str(error) or type(error).__name__
