"""What a start does once: what was never there is put in, what a killed daemon left is taken away."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
from collections.abc import Collection
from pathlib import Path

from nimhost.entities import Provider
from nimhost.errors import DockerUnavailable
from nimhost.host.containers import Containers
from nimhost.host.files import FileStorage
from nimhost.refs import NGC_KEY, Ref
from nimhost.store import Store

log = logging.getLogger(__name__)
NVIDIA_BUILD = Ref("system", "nvidia-build")


LAZY = ("httpcore", "anyio._backends._asyncio")
"""What httpx imports when it sends its first request, which would hold up the loop for tens of milliseconds."""


def preload() -> None:
    for name in LAZY:
        importlib.import_module(name)


async def seed(store: Store) -> None:
    """The provider for NVIDIA's hosted models, on the first start only: who deletes it does not get it back."""
    async with store.transaction() as tx:
        if await tx.meta("seeded"):
            return
        if not await tx.find("providers", *NVIDIA_BUILD):
            wish = Provider(
                host_url="https://integrate.api.nvidia.com",
                api_key_secret_name=NGC_KEY.name,
                description="Models that NVIDIA hosts: https://build.nvidia.com",
            )
            await tx.insert("providers", *NVIDIA_BUILD, wish)
        await tx.set_meta("seeded", "1")


async def sweep_files(files: FileStorage, store: Store) -> None:
    """Removes the files of filesets whose deletion was cut off between the row and the files."""
    for workspace, name in await files.filesets():
        async with store.transaction() as tx:  # nobody makes a fileset of that name meanwhile
            fileset = "filesets", workspace, name
            if not (await tx.find_unreadable(*fileset) or await tx.find(*fileset)):
                await files.delete_all(files.directory(workspace, name))


async def sweep_container_files(directory: Path, containers: Containers) -> None:
    """Removes files that were written for containers which are gone. Only before the first container is made: the files
    of one are there before it is. While Docker is away nobody knows which they are; the next start does it."""
    try:
        mounted = {path for container in await containers.list() for path in container.mounts}
    except DockerUnavailable:
        return
    await asyncio.to_thread(_remove_others, directory, {os.path.realpath(path) for path in mounted})


def _remove_others(directory: Path, kept: Collection[str]) -> None:
    for path in directory.glob("*/*"):
        if os.path.realpath(path) not in kept:
            try:
                path.unlink()
                if not any(path.parent.iterdir()):
                    path.parent.rmdir()
            except OSError as error:
                log.warning("%s cannot be removed: %s", path, error.strerror)
