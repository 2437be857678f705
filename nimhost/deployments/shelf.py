"""What lies in the weights cache, who uses it, and what may go: pure."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

DAY_S = 86_400.0


class Shelved(Struct, frozen=True, kw_only=True):
    """One snapshot, or (without a commit) what a download has left beside them. The row of `nimhost weights list`."""

    repo: str
    """As one would ask for it: `Qwen/Qwen3-1.7B`, `ngc://nvidia/nemo/llama`."""
    commit: str
    names: tuple[str, ...] = ()
    """Branches and tags that led to it."""
    repo_type: str = "model"
    state: Literal["complete", "partial", "damaged", "fetching"]
    size_bytes: int
    own_bytes: int
    """What is free without it."""
    fetched_by_nimhost: bool
    deployments: tuple[str, ...] = ()
    filesets: tuple[str, ...] = ()
    used_at: float
    """Seconds since 1970, to an hour."""
    folder: str


class Use(Struct, frozen=True, kw_only=True):
    """Somebody who needs weights. `commit`: None where it is not known which, as long as nothing was fetched."""

    kind: Literal["deployments", "filesets"]
    ref: str
    folder: str
    commit: str | None


def with_users(rows: Iterable[Shelved], uses: Iterable[Use]) -> list[Shelved]:
    """Each row with those who need it. What is left of a download belongs to whoever needs the repository."""
    found = []
    uses = tuple(uses)
    for row in rows:
        mine = [u for u in uses if u.folder == row.folder and (not row.commit or u.commit in (row.commit, None))]
        by_kind = {kind: tuple(sorted({u.ref for u in mine if u.kind == kind})) for kind in ("deployments", "filesets")}
        found.append(replace(row, **by_kind))
    return found


def why_kept(row: Shelved, now: float, unused_for_s: float) -> str | None:
    """Why it may not go; None when it may.

    1 it is being fetched · 2 others brought it here, or part of it · 3 a deployment or fileset needs it · 4 it was
    used not long ago.
    """
    if row.state == "fetching":  # 1
        return "it is being fetched"
    if not row.fetched_by_nimhost:  # 2
        return "another tool fetched it, or a part of it"
    if row.deployments:  # 3
        return f"deployment {row.deployments[0]} uses it"
    if row.filesets:
        return f"fileset {row.filesets[0]} names it"
    if now - row.used_at < unused_for_s:  # 4
        return f"it was used {_ago(now - row.used_at)} ago"
    return None


def _ago(seconds: float) -> str:
    if seconds >= 2 * DAY_S:
        return f"{seconds / DAY_S:.0f} days"
    return f"{max(0.0, seconds) / 3600:.0f} hours"
