"""A pull, line by line: what its stream says, added up; and the watch for one that stalls."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from nimhost.errors import RegistryUnavailable
from nimhost.host.container import PullProgress
from nimhost.host.docker_errors import refusal
from nimhost.host.docker_stream import BlockingStream

Json = Mapping[str, Any]
_NOTICE_S = 5.0
"""After so long without news a pull says so."""


class Layer(Struct, frozen=True):
    done_bytes: int = 0
    total_bytes: int = 0
    fetched: bool = False
    unpacked: bool = False


class Pull(Struct, frozen=True):
    """A pull so far, layer by layer."""

    layers: dict[str, Layer] = {}
    message: str = ""

    @property
    def fetched(self) -> bool:
        """Everything is here: what is still silent now is the disk, not the registry."""
        return bool(self.layers) and all(layer.fetched for layer in self.layers.values())

    @property
    def progress(self) -> PullProgress:
        layers = self.layers.values()
        return PullProgress(
            done_bytes=sum(layer.done_bytes for layer in layers),
            total_bytes=sum(layer.total_bytes for layer in layers),
            layers_done=sum(layer.unpacked for layer in layers),
            layers=len(layers),
            message=self.message,
        )

    def after(self, line: Json) -> Pull:
        """With one more line of the stream of `/images/create`."""
        status, name = line.get("status") or "", line.get("id")
        if name is None or status.startswith("Pulling from"):
            return self
        layer = _layer_after(self.layers.get(name, Layer()), status, line.get("progressDetail") or {})
        return Pull({**self.layers, name: layer}, status if status.startswith("Retrying") else "")


def _layer_after(layer: Layer, status: str, detail: Json) -> Layer:
    total = max(layer.total_bytes, detail.get("total") or 0)
    if status == "Downloading":
        return Layer(detail.get("current") or 0, total)
    if status == "Already exists":
        return Layer(0, 0, fetched=True, unpacked=True)
    if status in ("Download complete", "Verifying Checksum", "Extracting"):
        return Layer(total, total, fetched=status != "Verifying Checksum" or layer.fetched)
    if status == "Pull complete":
        return Layer(total, total, fetched=True, unpacked=True)
    return layer


async def follow_pull(
    name: str,
    stream: BlockingStream[Json],
    on_progress: Callable[[PullProgress], None],
    stall_timeout_s: float,
) -> None:
    """Report the lines of a pull until it ends; say so when none come. Raises what the lines report."""
    pull, quiet_since = Pull(), time.monotonic()
    while True:
        try:
            line = await stream.next(min(_NOTICE_S, stall_timeout_s))
        except TimeoutError:
            quiet_s = time.monotonic() - quiet_since
            on_progress(replace(pull.progress, message=f"no progress for {quiet_s:.0f} s"))
            # With every layer here it is this machine that is slow, and no registry can be blamed.
            if quiet_s >= stall_timeout_s and not pull.fetched:
                message = f"Image {name}: no progress for {quiet_s:.0f} s"
                raise RegistryUnavailable(message, "Check the connection to the registry.") from None
            continue
        if line is None:
            return
        if "error" in line:
            detail = line.get("errorDetail") or {}
            raise refusal(detail.get("code"), detail.get("message") or line["error"], image=name, pulling=True)
        pull, quiet_since = pull.after(line), time.monotonic()
        on_progress(pull.progress)
