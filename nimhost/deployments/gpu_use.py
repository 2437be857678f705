"""Who uses which GPU: containers that asked for it, and processes that were seen on it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import Struct
from msgspec.structs import replace

from nimhost.deployments.labels import read_labels
from nimhost.deployments.observed import GpuSlot, Share, Stranger
from nimhost.host.containers import Container
from nimhost.host.gpus import LINKS, Gpu, GpuProcess

HOLDING = frozenset({"running", "paused", "restarting", "removing"})
"""States in which a container has its GPUs. One that exited holds none."""


class Claim(Struct, frozen=True):
    """A container on this machine and the GPUs it asked for."""

    holder: str
    container_id: str
    gpu_ids: tuple[str, ...]
    share_bytes: int | None = None
    """What it was given of each of them; None: all."""
    hash: str = ""


def claims_of(containers: Iterable[Container]) -> tuple[Claim, ...]:
    return tuple(_claim(c) for c in containers if c.state in HOLDING and c.gpu_ids)


def _claim(container: Container) -> Claim:
    labels = read_labels(container.labels)
    if labels is None:
        return Claim(f"container {container.name}", container.id, container.gpu_ids)
    return Claim(str(labels.deployment), container.id, container.gpu_ids, labels.share_bytes, labels.hash)


def by_uuid(claims: Iterable[Claim], inventory: Iterable[Gpu]) -> tuple[Claim, ...]:
    """The same with the uuids of what they have: a claim may name indexes, or want a number of GPUs, which are the
    first ones. `inventory`: every GPU of the machine, also those that nimhost may not use."""
    ordered = sorted(inventory, key=lambda gpu: gpu.index)

    def uuids(claim: Claim) -> tuple[str, ...]:
        return tuple(dict.fromkeys(gpu.uuid for wanted in claim.gpu_ids for gpu in _named(wanted, ordered)))

    return tuple(replace(claim, gpu_ids=uuids(claim)) for claim in claims)


def slots_of(gpus: Sequence[Gpu], claims: Iterable[Claim]) -> tuple[GpuSlot, ...]:
    """`claims` are `by_uuid`."""
    by_gpu: dict[str, list[Claim]] = {gpu.uuid: [] for gpu in gpus}
    for claim in claims:
        for uuid in claim.gpu_ids:
            if uuid in by_gpu:
                by_gpu[uuid].append(claim)
    return tuple(_slot(gpu, by_gpu[gpu.uuid]) for gpu in gpus)


def _slot(gpu: Gpu, claims: Sequence[Claim]) -> GpuSlot:
    ours = {claim.container_id for claim in claims}
    return GpuSlot(
        uuid=gpu.uuid,
        index=gpu.index,
        name=gpu.name,
        total_bytes=gpu.memory_bytes,
        used_bytes=gpu.used_bytes,
        problem=gpu.problem,
        holder=next((claim.holder for claim in claims if claim.share_bytes is None), None),
        shares=tuple(sorted(Share(c.holder, c.share_bytes, c.hash) for c in claims if c.share_bytes is not None)),
        strangers=tuple(_stranger(p) for p in gpu.processes if p.container_id not in ours),
        links={uuid: len(LINKS) - LINKS.index(link) for uuid, link in gpu.links.items()},
    )


def _stranger(process: GpuProcess) -> Stranger:
    return Stranger(pid=process.pid, name=process.name, user=process.user, used_bytes=process.used_bytes)


def _named(wanted: str, gpus: list[Gpu]) -> list[Gpu]:
    if wanted == "all":
        return gpus
    if wanted.startswith("count:"):
        return gpus[: int(wanted.removeprefix("count:"))]
    return [gpu for gpu in gpus if wanted in (gpu.uuid, str(gpu.index))]


def shown(gpu: Gpu, claims: Sequence[Claim], usable: bool = True) -> dict[str, object]:
    """What the API tells about a GPU: its memory, who has it, and every process on it with what it belongs to.

    `claims` are `by_uuid`. `usable`: whether the settings let nimhost use it.
    """
    slot = slots_of((gpu,), claims)[0]
    owners = {claim.container_id: claim.holder for claim in claims}
    return {
        "uuid": gpu.uuid,
        "index": gpu.index,
        "name": gpu.name,
        "memory_bytes": gpu.memory_bytes,
        "used_bytes": gpu.used_bytes,
        "free_bytes": max(0, gpu.memory_bytes - gpu.used_bytes),
        "simulated": gpu.simulated,
        "problem": gpu.problem,
        "usable": usable,
        "holder": slot.holder,
        "shares": [{"holder": share.holder, "memory_bytes": share.size_bytes} for share in slot.shares],
        "links": dict(gpu.links),
        "processes": [
            {
                "pid": p.pid,
                "name": p.name,
                "user": p.user,
                "used_bytes": p.used_bytes,
                "container_id": p.container_id,
                "deployment": owners.get(p.container_id) if p.container_id else None,
            }
            for p in gpu.processes
        ],
    }
