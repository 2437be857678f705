"""The labels and names of our containers: what lets the next start find and understand them. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import msgspec
from msgspec import Struct

from nimhost.engines.spec import Probe
from nimhost.refs import Ref

PREFIX = "io.nimhost."


class Labels(Struct, frozen=True, kw_only=True):
    """`owner` is the uuid of an installation; `epoch` counts its container starts."""

    owner: str
    deployment: Ref
    version: int
    hash: str
    gpus: tuple[str, ...]
    probe: Probe
    epoch: int
    share_bytes: int | None = None
    """How much of each GPU it has; None: all."""

    def encode(self) -> dict[str, str]:
        return {
            f"{PREFIX}owner": self.owner,
            f"{PREFIX}deployment": str(self.deployment),
            f"{PREFIX}version": str(self.version),
            f"{PREFIX}hash": self.hash,
            f"{PREFIX}gpus": ",".join(self.gpus),
            f"{PREFIX}health": msgspec.json.encode(self.probe).decode(),
            f"{PREFIX}epoch": str(self.epoch),
            **({f"{PREFIX}share": str(self.share_bytes)} if self.share_bytes is not None else {}),
        }


def owner_of(labels: Mapping[str, str]) -> str | None:
    return labels.get(f"{PREFIX}owner")


def read_labels(labels: Mapping[str, str]) -> Labels | None:
    """None for a container that is not an engine of some nimhost's, or whose labels were tampered with."""
    try:
        return Labels(
            owner=labels[f"{PREFIX}owner"],
            deployment=Ref(*labels[f"{PREFIX}deployment"].split("/", 1)),
            version=int(labels[f"{PREFIX}version"]),
            hash=labels[f"{PREFIX}hash"],
            gpus=tuple(filter(None, labels[f"{PREFIX}gpus"].split(","))),
            probe=msgspec.json.decode(labels[f"{PREFIX}health"], type=Probe),
            epoch=int(labels[f"{PREFIX}epoch"]),
            share_bytes=int(share) if (share := labels.get(f"{PREFIX}share")) else None,
        )
    except (KeyError, ValueError, TypeError, msgspec.MsgspecError):
        return None


def container_name(ref: Ref, wish_hash: str, owner: str) -> str:
    """Another installation on the same engine, with the same wish under the same name, gets another one."""
    return f"nimhost-{ref.workspace}-{ref.name}-{hashlib.sha256(f'{owner}/{wish_hash}'.encode()).hexdigest()[:8]}"
