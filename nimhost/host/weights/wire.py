"""What the daemon and its download process say to each other: one JSON object per line, on stdin and stdout."""

from __future__ import annotations

from typing import Literal

import msgspec
from msgspec import Struct

LATEST = "latest"
"""The revision of an NGC artifact that stands for its newest version."""


class Repo(Struct, frozen=True):
    """A repository at a revision (branch, tag or commit). `endpoint`: another hub than the configured one.

    One of NGC is a model or a resource: `repo_id` is `org/team/name` (team `no-team`: none), `revision` its version.
    """

    repo_id: str
    revision: str = "main"
    repo_type: str = "model"
    endpoint: str | None = None
    branch: str | None = None
    """Of a commit: what led to it. With the weights in the cache it leads there without the hub, too."""

    registry: Literal["hub", "ngc"] = "hub"

    def __str__(self) -> str:
        if self.registry == "ngc":
            return f"ngc://{self.repo_id}:{self.revision}"
        return self.repo_id if self.revision == "main" else f"{self.repo_id}@{self.revision}"


class Choice(Struct, frozen=True):
    """Some of the files that would be fetched: those that match a pattern of `allow` (none: all), and none of
    `ignore`."""

    allow: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()


ALL = Choice()


class Limits(Struct, frozen=True):
    """How patient a download is."""

    stall_s: float = 30.0
    """Silence after which a connection is given up."""
    tries: int = 6
    """Failures in a row, without a byte in between, after which the hub counts as unavailable."""
    backoff_s: float = 1.0
    """The first pause between two tries; each further one is twice as long, 30 s at most."""
    patience_s: float = 900.0
    """The longest `Retry-After` that is waited for."""
    parallel: int = 8
    """Connections that are open at the same time."""
    part_bytes: int = 16 << 20
    """A file of at least two of these comes in parts, over several connections."""


class Job(Struct, frozen=True):
    """What the child is to do. The token travels here: on stdin, never in argv or the environment."""

    repo: Repo
    endpoint: str
    cache_dir: str
    token: str | None = None
    limits: Limits = Limits()
    choice: Choice = ALL


class WeightsProgress(Struct, frozen=True, tag="progress", tag_field="type"):
    done_bytes: int
    total_bytes: int
    rate_bytes_s: float
    message: str
    """What is being waited for, e.g. `hub answers 429, retrying in 12 s`; empty while bytes flow."""
    eta_s: float | None = None
    """Time left at the present rate; None while nothing comes."""


class Done(Struct, frozen=True, tag="done", tag_field="type"):
    commit: str


class Failed(Struct, frozen=True, tag="failed", tag_field="type"):
    """A NimhostError in transit: the name of its class, and its attributes."""

    error: str
    message: str
    hint: str | None = None
    retry_after_s: float | None = None


Line = WeightsProgress | Done | Failed
encode = msgspec.json.encode
line_decoder = msgspec.json.Decoder(Line)
job_decoder = msgspec.json.Decoder(Job)
