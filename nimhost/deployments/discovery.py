"""What external providers serve: asked when a provider or its secret changes, then every few minutes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

import httpx
import msgspec
from msgspec import Struct

from nimhost.deployments.publish import NO_MODELS, entity_for, write_provider
from nimhost.entities import Entity, Provider, ProviderStatus, ServedModel
from nimhost.store import Store

log = logging.getLogger(__name__)

STEADY_INTERVAL_S = 300.0
RETRY_S = (2.0, 60.0)
TIMEOUT_S = 15.0


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
        self._client: httpx.AsyncClient | None = None

    def watch(self, questions: Iterable[Question]) -> None:
        """Ask exactly these from now on; one whose wish or key changed is asked again at once."""
        wanted = {q.provider.id: q for q in questions}
        for key, (question, task) in list(self._tasks.items()):
            if key not in wanted or not _same(question, wanted[key]):
                task.cancel()
                del self._tasks[key]
        for key, question in wanted.items():
            if key not in self._tasks:
                task = asyncio.create_task(self._follow(question), name=f"discovery {question.provider.ref}")
                self._tasks[key] = (question, task)

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
            await self._write(question, status)
            if question.problem is not None:
                return  # there is nothing to ask until the question changes
            if status.status == "READY":
                pause_s = RETRY_S[0]
                await asyncio.sleep(STEADY_INTERVAL_S)
            else:
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, RETRY_S[1])

    async def _ask(self, question: Question) -> ProviderStatus:
        if question.problem is not None:
            return ProviderStatus(status="ERROR", status_message=question.problem)
        if self._client is None:
            self._client = httpx.AsyncClient(timeout=TIMEOUT_S)
        try:
            reply = await self._client.get(question.url, headers=list(question.headers))
        except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
            return ProviderStatus(status="ERROR", status_message=f"Cannot reach {question.url}: {_why(error)}")
        return judge(question.provider, question.url, reply.status_code, reply.content)

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


class _ModelList(Struct):
    class Item(Struct):
        id: str

    data: list[Item]


def judge(provider: Entity, url: str, status_code: int, body: bytes) -> ProviderStatus:
    """What an answer to `GET /v1/models` says about a provider. Pure."""
    wish: Provider = provider.wish
    if status_code in (401, 403):
        secret = wish.api_key_secret_name
        fix = f"update it with: nimhost secrets update {secret}" if secret else "it wants a key: api_key_secret_name"
        return ProviderStatus(status="ERROR", status_message=f"{url} refused the key (HTTP {status_code}); {fix}")
    if status_code != 200 and status_code != 404:
        return ProviderStatus(status="ERROR", status_message=f"{url} answered HTTP {status_code}")
    try:
        ids = [item.id for item in msgspec.json.decode(body, type=_ModelList).data] if status_code == 200 else None
    except msgspec.MsgspecError:
        ids = None
    if ids is None:
        return ProviderStatus(status="READY", status_message=NO_MODELS)
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
