"""Who uses what of the weights cache, and what may go."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from nimhost.deployments.shelf import DAY_S, Shelved, Use, why_kept, with_users

NOW = 1000 * DAY_S
OLD = Shelved(
    repo="a/b", commit="c1", state="complete", size_bytes=5, own_bytes=5, fetched_by_nimhost=True,
    used_at=NOW - 40 * DAY_S, folder="models--a--b",
)  # fmt: skip


def use(kind: str = "deployments", ref: str = "w/d", folder: str = OLD.folder, commit: str | None = "c1") -> Use:
    return Use(kind=kind, ref=ref, folder=folder, commit=commit)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "unused_for_s", "why"),
    [
        (OLD, 0, None),
        (OLD, 30 * DAY_S, None),
        (OLD, 41 * DAY_S, "it was used 40 days ago"),
        (replace(OLD, used_at=NOW - 7200), DAY_S, "it was used 2 hours ago"),
        (replace(OLD, used_at=NOW + 60), 1, "it was used 0 hours ago"),
        (replace(OLD, state="damaged"), 0, None),
        (replace(OLD, state="partial", commit=""), 0, None),
        (replace(OLD, deployments=("w/d",)), 0, "deployment w/d uses it"),
        (replace(OLD, filesets=("w/f",)), 0, "fileset w/f names it"),
        (replace(OLD, fetched_by_nimhost=False), 0, "another tool fetched it, or a part of it"),
        (replace(OLD, state="fetching"), 0, "it is being fetched"),
    ],
)
def test_only_what_is_ours_old_and_unused_goes(row: Shelved, unused_for_s: float, why: str | None) -> None:
    assert why_kept(row, NOW, unused_for_s) == why


@pytest.mark.parametrize(
    ("row", "use", "used"),
    [
        (OLD, use(), True),
        (OLD, use(commit="c2"), False),
        (OLD, use(folder="models--a--c"), False),
        (OLD, use(commit=None), True),  # a branch that nobody has looked up yet may mean this very commit
        (replace(OLD, commit=""), use(commit="c2"), True),  # what a download left belongs to whoever needs the rest
        (replace(OLD, commit=""), use(folder="models--a--c"), False),
    ],
)
def test_a_user_is_found_by_repository_and_commit(row: Shelved, use: Use, used: bool) -> None:
    (found,) = with_users([row], [use])
    assert found.deployments == (("w/d",) if used else ())


def test_users_are_told_once_and_in_order() -> None:
    (found,) = with_users([OLD], [use(ref="w/z"), use(ref="w/a"), use(ref="w/a"), use("filesets", "w/f")])
    assert (found.deployments, found.filesets) == (("w/a", "w/z"), ("w/f",))
