"""Single files of a fileset, wherever it is: names, and first bytes of files. What a model is needs no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from nimhost.errors import HubUnavailable, WeightsMissing
from nimhost.host.threads import in_thread
from nimhost.host.weights.hub import NETWORK, Interrupted, Patience, reason
from nimhost.host.weights.ngc import open_registry
from nimhost.host.weights.wire import Limits, Repo

PATIENCE = Limits(stall_s=10, tries=2, backoff_s=0.5, patience_s=2)
"""Somebody waits for the answer, and whoever asked asks again."""


class Source(Protocol):
    """Its text is where it is, for messages."""

    async def names(self) -> list[str]:
        """Paths of all files. Raises a HostError."""
        ...

    async def read(self, path: str, size_bytes: int) -> bytes:
        """The first `size_bytes` of a file, or all of a shorter one. Raises a HostError."""
        ...


class Directory:
    """A directory of this machine."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    async def names(self) -> list[str]:
        return await in_thread(self._names)

    async def read(self, path: str, size_bytes: int) -> bytes:
        return await in_thread(self._read, path, size_bytes)

    def _names(self) -> list[str]:
        """Of itself and its `alternates/hf`: nothing else makes a checkpoint."""
        folders = (self._path, self._path / "alternates" / "hf")
        found = (path for folder in folders if folder.is_dir() for path in folder.iterdir() if path.is_file())
        try:
            return sorted(str(path.relative_to(self._path)) for path in found)
        except OSError as error:
            raise WeightsMissing(f"cannot read {self._path}: {error.strerror}") from None

    def _read(self, path: str, size_bytes: int) -> bytes:
        try:
            with (self._path / path).open("rb") as file:
                return file.read(size_bytes)
        except OSError as error:
            raise WeightsMissing(f"cannot read {self._path / path}: {error.strerror}") from None


class Repository:
    """A repository on a model hub or NGC, at the commit its revision stands for now."""

    def __init__(self, repo: Repo, endpoint: str, token: str | None) -> None:
        self._hub = open_registry(repo, endpoint, token, PATIENCE)
        self._commit = ""

    def __str__(self) -> str:
        return f"{self._hub.repo} at {self._hub.endpoint}"

    async def names(self) -> list[str]:
        return await in_thread(self._names)

    async def read(self, path: str, size_bytes: int) -> bytes:
        return await in_thread(self._read, path, size_bytes)

    def _names(self) -> list[str]:
        self._commit = self._hub.commit(_silent)
        return sorted(file.path for file in self._hub.tree(self._commit, _silent))

    def _read(self, path: str, size_bytes: int) -> bytes:
        if not self._commit:
            self._commit = self._hub.commit(_silent)
        url, patience = self._hub.file_url(self._commit, path), Patience(self._hub, _silent)
        while True:
            try:
                with self._hub.open(url, stop=size_bytes) as response:
                    return response.read(size_bytes)
            except Interrupted as failure:
                patience.wait(failure)
            except NETWORK as error:
                patience.wait(Interrupted(reason(error, PATIENCE.stall_s)))
            except ValueError as error:
                raise HubUnavailable(f"{self._hub.endpoint} does not answer like a model hub: {error}") from error


def _silent(message: str) -> None:
    """Nobody shows the steps of a question that takes a second."""
