"""Keeps the gateway's table in step with what is stored and what runs."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence

from nimhost.deployments.adapters import wanted_adapters
from nimhost.deployments.desired import Desired
from nimhost.deployments.discovery import Question
from nimhost.deployments.loading import Loader
from nimhost.deployments.logins import Secret
from nimhost.deployments.routing import Key, not_looked_at, provider_key, route_table
from nimhost.deployments.situation import Verdict
from nimhost.entities import Entity
from nimhost.errors import NimhostError, NotFound
from nimhost.gateway.proxy import Gateway
from nimhost.gateway.routes import HOP
from nimhost.refs import Ref
from nimhost.store import Store


class Router:
    """`read_desired`: what is wished now."""

    def __init__(
        self, store: Store, gateway: Gateway, loader: Loader, secret: Secret,
        read_desired: Callable[[], Awaitable[Iterable[Desired]]],
    ) -> None:  # fmt: skip
        self._store = store
        self._gateway = gateway
        self._loader = loader
        self._secret = secret
        self._read_desired = read_desired
        self._verdicts: Sequence[Verdict] = ()
        self._routing = asyncio.Lock()

    async def recall(self) -> None:
        """Routes from what is stored, for requests before the first look: those for engines are asked to wait."""
        await self.route([not_looked_at(d) for d in await self._read_desired()])

    async def follow(self) -> None:
        """Routes from what is stored now, and the verdicts of the last round: the next one may take its time."""
        await self.route(None)

    async def route(self, verdicts: Sequence[Verdict] | None) -> tuple[Question, ...]:
        """Routes as the rows and the verdicts say (None: the last ones); what is to be asked of the providers
        elsewhere."""
        async with self._routing:  # or the older of two readings could be the one that stays
            self._verdicts = self._verdicts if verdicts is None else verdicts
            return await self._route(self._verdicts)

    async def _route(self, verdicts: Sequence[Verdict]) -> tuple[Question, ...]:
        providers = await self._store.all("providers")
        verdicts = (*verdicts, *await self._not_judged(providers, verdicts))
        keys = {Ref(p.workspace, p.name): await self._key(p) for p in providers}
        self._gateway.table = route_table(
            providers,
            await self._store.by_ref("models"),
            await self._store.all("workspaces"),
            verdicts,
            keys,
            await self._store.all("virtual-models"),
            adapters := await self._store.all("adapters"),
            self._loader.waiting(wanted_adapters(adapters)),
            self._gateway.hop,
        )
        return tuple(
            Question(provider=p, headers=self._headers(p, key), problem=key.problem)
            for p in providers
            if p.wish.model_deployment_id is None
            for key in [keys[Ref(p.workspace, p.name)]]
        )

    async def _not_judged(self, providers: Iterable[Entity], verdicts: Iterable[Verdict]) -> list[Verdict]:
        """For deployments that were made since the verdicts were: what is asked of them waits like of any other."""
        owned = {Ref(p.workspace, p.name) for p in providers if p.wish.model_deployment_id is not None}
        if not (new := owned - {v.desired.ref for v in verdicts}):
            return []
        return [not_looked_at(d) for d in await self._read_desired() if d.ref in new]

    def _headers(self, provider: Entity, key: Key) -> tuple[tuple[str, str], ...]:
        """What discovery sends: the same as the gateway."""
        wish = provider.wish
        extra = (wish.default_extra_headers or {}) | (wish.required_extra_headers or {})
        return (*key.headers, *extra.items(), (HOP, self._gateway.hop))

    async def _key(self, provider: Entity) -> Key:
        name = provider.wish.api_key_secret_name
        try:
            secret = await self._secret(Ref(provider.workspace, name)) if name else None
        except NotFound:
            secret = None
        except NimhostError as error:
            return Key(problem=error.in_full)
        return provider_key(provider, secret)
