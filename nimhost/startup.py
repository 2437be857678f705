"""What a start does once: what was never there is put in, what a killed daemon left is taken away."""

from __future__ import annotations

from nimhost.entities import Provider
from nimhost.host.files import FileStorage
from nimhost.refs import NGC_KEY, Ref
from nimhost.store import Store

NVIDIA_BUILD = Ref("system", "nvidia-build")


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
            if not await tx.find("filesets", workspace, name):
                await files.delete_all(files.directory(workspace, name))
