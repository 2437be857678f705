"""What registries say about images that are not on this machine: asked in the background, kept for a while.

Whoever decides takes what is known; the pull begins when its registry has answered, or has had its time for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from msgspec import Struct

from nimhost.deployments.logins import Secret, ngc_login
from nimhost.errors import NimhostError
from nimhost.host.containers import Containers
from nimhost.host.registry import Offer, Registries

KEEP_S = 3600.0
"""A tag may be given to another image, so it is asked for again after this time. Not sooner: each time counts as a
pull, of which a registry may allow a hundred in six hours, and who was refused may wait for days."""
ASK_AGAIN_S = 60.0
"""After a registry said nothing."""
FORGET_S = 600.0
"""An answer that is past its time for so long was not asked for again: nobody wants it any more."""

Ask = Callable[[str, str], Awaitable[Offer | None]]
"""(image, architecture) -> what its registry has; None where that is not known."""


def asking(registries: Registries, containers: Containers, secret: Secret) -> Ask:
    """With the login of the pull."""

    async def ask(image: str, architecture: str) -> Offer | None:
        try:
            async with asyncio.timeout(registries.limit_s):
                login = await ngc_login(image, secret) or await containers.login(image)
                return await registries.ask(image, architecture, login)
        except (NimhostError, TimeoutError):
            return None  # the pull meets the same, and there it has consequences

    return ask


class _Answer(Struct, frozen=True):
    offer: Offer | None
    until: float
    """`time.monotonic()`."""


class Offers:
    """`ask`: None asks nobody, and nothing is known. `on_answer` is called on the loop after each answer."""

    def __init__(self, ask: Ask | None, on_answer: Callable[[], None]) -> None:
        self._ask = ask
        self._on_answer = on_answer
        self._answers: dict[tuple[str, str], _Answer] = {}
        self._asking: dict[tuple[str, str], asyncio.Task[None]] = {}

    def of(self, image: str, architecture: str) -> tuple[Offer | None, bool]:
        """(what is known, whether an answer is awaited): never waits, but asks where nothing is known any more.

        An old answer holds until there is a new one.
        """
        if self._ask is None:
            return None, False
        key = image, architecture
        known = self._answers.get(key)
        if (known is None or known.until < time.monotonic()) and key not in self._asking:
            self._asking[key] = asyncio.create_task(self._look(self._ask, key), name=f"offer {image}")
        offer = known.offer if known else None
        return offer, offer is None and key in self._asking

    async def settled(self) -> None:
        """When every question under way has its answer, or was given up."""
        if self._asking:
            await asyncio.wait(tuple(self._asking.values()))

    async def close(self) -> None:
        for task in self._asking.values():
            task.cancel()
        await self.settled()

    async def _look(self, ask: Ask, key: tuple[str, str]) -> None:
        offer = None
        try:
            offer = await ask(*key)
        finally:
            before = self._answers.pop(key, None)
            now = time.monotonic()
            until = now + (KEEP_S if offer else ASK_AGAIN_S)
            self._answers = {other: known for other, known in self._answers.items() if known.until + FORGET_S > now}
            self._answers[key] = _Answer(offer or (before.offer if before else None), until)
            del self._asking[key]
            self._on_answer()
