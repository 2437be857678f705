from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nimhost.deployments import loading, probe
from nimhost.store import Store


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    opened = await Store.open(tmp_path / "nimhost.db")
    yield opened
    await opened.close()


@pytest.fixture
def attentive(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines that serve are probed as often as those that start."""
    monkeypatch.setattr(probe, "STEADY_INTERVAL_S", probe.FIRST_INTERVAL_S)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests do not wait for adapters that are not loaded at once."""
    monkeypatch.setattr(loading, "PATIENCE_S", 0.5)
