"""One reading of the machine, as the plan sees it: containers of ours, GPUs, images, weights. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from msgspec import Struct

from nimhost.refs import Ref


class Health(Struct, frozen=True, kw_only=True):
    """What probing a running engine found.

    unknown: not probed yet. starting: has not answered well since it was first probed. ok. failing: it was ok, and
    since Unix time `since` it is not (a single failed probe does not count).
    """

    state: Literal["unknown", "starting", "ok", "failing"] = "unknown"
    detail: str = ""
    since: float = 0.0
    models: tuple[str, ...] = ()


class Instance(Struct, frozen=True, kw_only=True):
    """One of our containers."""

    id: str
    ref: Ref
    hash: str
    state: Literal["created", "running", "exited"]
    exit_code: int | None = None
    oom_killed: bool = False
    started_at: float = 0.0
    port: int | None = None
    health: Health = Health()
    log_tail: str = ""


class GpuSlot(Struct, frozen=True, kw_only=True):
    """A GPU that nimhost may use; `holder` says who has it."""

    uuid: str
    index: int
    holder: str | None = None


class Located(Struct, frozen=True, kw_only=True):
    """Weights on this machine: what to mount, and the checkpoint's directory below it."""

    source: str
    subdirectory: str = ""
    commit: str | None = None


class Observed(Struct, frozen=True, kw_only=True):
    """One reading of the machine. `docker_problem`: why there is no container list, and then nothing is done."""

    docker_problem: str | None = None
    instances: tuple[Instance, ...] = ()
    gpus: tuple[GpuSlot, ...] = ()
    gpu_problem: str | None = None
    """Why there are no GPUs, or not all."""
    images: Mapping[Ref, str | None] = {}
    """Id of the image that a deployment wants; None when it is not on this machine."""
    weights: Mapping[Ref, Located | None] = {}
