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


class _Quiet:
    """How long a pull has said nothing new. An engine that keeps images with containerd says the same ten times a
    second (moby, daemon/containerd/progress.go): a line alone is no sign of life."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._said: dict[str | None, tuple[Any, Any]] = {}

    def is_broken_by(self, line: Json) -> bool:
        layer, said = line.get("id"), (line.get("status"), (line.get("progressDetail") or {}).get("current"))
        if self._said.get(layer) == said:
            return False
        self._said[layer], self._since = said, time.monotonic()
        return True

    @property
    def lasted_s(self) -> float:
        return time.monotonic() - self._since


async def follow_pull(
    name: str,
    stream: BlockingStream[Json],
    on_progress: Callable[[PullProgress], None],
    stall_timeout_s: float,
) -> None:
    """Report the lines of a pull until it ends; say so when none says anything new. Raises what the lines report."""
    pull, quiet, notice_s = Pull(), _Quiet(), min(_NOTICE_S, stall_timeout_s)
    told_s = notice_s
    while True:
        try:
            line = await stream.next(notice_s)
        except TimeoutError:
            line = {}
        if line is None:
            return
        if "error" in line:
            detail = line.get("errorDetail") or {}
            raise refusal(detail.get("code"), detail.get("message") or line["error"], image=name, pulling=True)
        if line and quiet.is_broken_by(line):
            pull, told_s = pull.after(line), notice_s
            on_progress(pull.progress)
        elif quiet.lasted_s >= told_s:
            told_s = quiet.lasted_s + notice_s
            _tell_quiet(name, pull, quiet.lasted_s, on_progress, stall_timeout_s)


def _tell_quiet(
    name: str, pull: Pull, quiet_s: float, on_progress: Callable[[PullProgress], None], stall_timeout_s: float
) -> None:
    said = f"no progress for {quiet_s:.0f} s"
    on_progress(replace(pull.progress, message=said))
    # With every layer here it is this machine that is slow, and no registry can be blamed.
    if quiet_s >= stall_timeout_s and not pull.fetched:
        raise RegistryUnavailable(f"Image {name}: {said}", "Check the connection to the registry.")
