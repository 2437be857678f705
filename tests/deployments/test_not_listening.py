"""What is said of an engine that does not listen yet, and of one that does not listen any more."""

from __future__ import annotations

from pathlib import Path

import pytest

from nimhost.deployments.probe import NOBODY_THERE
from tests.fakes.containers import FakeContainer
from tests.support import eventually
from tests.world import MODELS, World


@pytest.mark.usefixtures("attentive")
@pytest.mark.parametrize("was_ready", [False, True])
async def test_that_nobody_listens_is_a_fault_only_of_an_engine_that_did(tmp_path: Path, was_ready: bool) -> None:
    async with World(tmp_path) as world:

        async def start(container: FakeContainer) -> int:
            return await world._start_engine(container) if was_ready else 1  # where nobody listens

        world.docker.on_start = start
        await world.deploy("one")
        if was_ready:
            await world.wait("one", "READY")
            for engine in world.engines.values():
                await engine.stop()

        async def found() -> bool:
            shown = (await world.http.get(f"{MODELS}/deployments/one/progress")).json()["progress"] or {}
            said = (shown.get("engine") or {}).get("message")
            return said in NOBODY_THERE if was_ready else said == "not listening yet"

        await eventually(found, 15)
