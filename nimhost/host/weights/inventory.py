"""What the weights cache holds: every snapshot in it, whoever brought it, and what is left of broken-off downloads.

Blocking: for a thread. Reads names, links and sizes, never the content of weights.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Literal

from msgspec import Struct

from nimhost.errors import WeightsMissing
from nimhost.host.weights.cache import NOWHERE, OURS, PARTIAL, STAGE, RepoCache, stat_of
from nimhost.host.weights.wire import Repo

log = logging.getLogger(__name__)

State = Literal["complete", "partial", "damaged"]
_FOLDER = re.compile(r"(ngc-)?(model|dataset|space|resource)s--(.+)")


class Held(Struct, frozen=True, kw_only=True):
    """One snapshot (`repo.revision` is its commit), or, where that is empty, what is in a repository beside them."""

    repo: Repo
    names: tuple[str, ...] = ()
    """Branches and tags that led to it."""
    state: State
    size_bytes: int
    own_bytes: int
    """What would be free without it: files that snapshots share are not among them."""
    ours: bool
    """All of it was fetched by nimhost."""
    used_at: float
    """When it was last used, to an hour; seconds since 1970."""


def scan(cache_dir: Path) -> list[Held]:
    """Everything, by name. A cache that is not there is empty; what is no repository is left out."""
    found = []
    for repo in sorted(repositories(cache_dir), key=str):
        with suppress(WeightsMissing):  # a folder of that form that cannot be a repository: not ours to judge
            try:
                found += look_at(cache_dir, repo)
            except OSError as error:  # what cannot be read in full is not shown, and so never removed
                log.warning("%s in %s is left out: %s", repo.repo_id, cache_dir, error)
    return found


def repositories(cache_dir: Path) -> Iterator[Repo]:
    for root, ngc in ((cache_dir, False), (cache_dir / OURS / "ngc", True)):
        for name in [path.name for path in _folders(root)]:
            match = _FOLDER.fullmatch(name)
            if match and bool(match[1]) == ngc:
                yield Repo(match[3].replace("--", "/"), "", match[2], registry="ngc" if ngc else "hub")


def look_at(cache_dir: Path, repo: Repo) -> list[Held]:
    """What there is of one repository, at any revision. Raises OSError where it cannot be read in full."""
    cache = cache_of(cache_dir, repo)
    snapshots = {path.name: blobs_of(path) for path in _folders(cache.dir / "snapshots") if not path.is_symlink()}
    users: dict[str, int] = {}
    for blobs in snapshots.values():
        for blob in blobs:
            users[blob] = users.get(blob, 0) + 1
    fetched = cache.fetched_digests()
    names = _names_by_commit(cache)
    found = []
    for commit, blobs in sorted(snapshots.items()):
        found.append(
            Held(
                repo=_at(repo, commit),
                names=tuple(sorted(names.get(commit, ()))),
                state=_state(cache_of(cache_dir, _at(repo, commit)), commit),
                size_bytes=sum(blobs.values()),
                own_bytes=sum(size for blob, size in blobs.items() if users[blob] == 1),
                ours=are_ours(cache, blobs, fetched),
                used_at=_used_at(cache, commit),
            )
        )
    loose = [stat for path in leftovers(cache, linked_blobs(cache), fetched) if (stat := stat_of(path))]
    if loose:
        size = sum(stat.st_blocks * 512 for stat in loose)
        used_at = max(stat.st_mtime for stat in loose)
        held = Held(repo=repo, state="partial", size_bytes=size, own_bytes=size, ours=True, used_at=used_at)
        found.append(held)
    return found


def cache_of(cache_dir: Path, repo: Repo) -> RepoCache:
    """`repo` with an empty revision means: any."""
    return RepoCache(cache_dir, repo if repo.revision else _at(repo, "main"))


def leftovers(cache: RepoCache, linked: set[str], fetched: set[str]) -> list[Path]:
    """Files of ours that no snapshot needs: half of a download, or all of one that was never finished."""
    staged = [Path(file) for stage in stages(cache) for file in _walk(stage)]
    return staged + [
        path
        for path in _files(Path(os.path.realpath(cache.blobs)))
        if path.name.endswith(PARTIAL) or (path.name in fetched and str(path) not in linked)
    ]


def stages(cache: RepoCache) -> list[Path]:
    """Directories that a download through Xet has left."""
    return [path for path in _folders(Path(os.path.realpath(cache.blobs))) if path.name.endswith(STAGE)]


def linked_blobs(cache: RepoCache, *, besides: str = "") -> set[str]:
    """Real paths of the blobs that the snapshots of a repository need, one commit left out.

    Raises OSError where not all of them can be read: a need that is not seen must not look like none.
    """
    return {b for path in _folders(cache.dir / "snapshots") if path.name != besides for b in blobs_of(path)}


def are_ours(cache: RepoCache, blobs: Collection[str], fetched: set[str]) -> bool:
    """Whether there are any, and nimhost brought them all."""
    home = os.path.realpath(cache.blobs)
    return bool(blobs) and all(b.rpartition("/")[0] == home and b.rpartition("/")[2] in fetched for b in blobs)


def _at(repo: Repo, commit: str) -> Repo:
    return Repo(repo.repo_id, commit, repo.repo_type, registry=repo.registry)


def _state(cache: RepoCache, commit: str) -> State:
    if cache.find(trust_others=True) is not None:
        return "complete"
    manifest = cache.manifest(commit)
    return "damaged" if manifest and any(file.damaged for file in manifest.files) else "partial"


def blobs_of(snapshot: Path) -> dict[str, int]:
    """Real path of each file behind a snapshot's links -> its size; a link that leads nowhere is left out.

    Raises OSError where it cannot be read in full.
    """
    found = {}
    for link in _walk(snapshot):
        target = os.path.realpath(link)
        if stat := stat_of(Path(target)):
            found[target] = stat.st_size
    return found


def _walk(root: Path) -> Iterator[str]:
    """Every file below it, also behind links to folders."""
    seen = set()
    for folder, folders, names in os.walk(root, followlinks=True, onerror=_raise_unless_gone):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (os.path.join(folder, name) for name in names)


def _raise_unless_gone(error: OSError) -> None:
    if error.errno not in NOWHERE:
        raise error


def _names_by_commit(cache: RepoCache) -> dict[str, set[str]]:
    root, names = cache.dir / "refs", dict[str, set[str]]()
    for folder, _, files in os.walk(root):
        for file in files:
            path = Path(folder) / file
            try:
                names.setdefault(path.read_text().strip(), set()).add(str(path.relative_to(root)))
            except (OSError, UnicodeDecodeError):
                continue
    return names


def _used_at(cache: RepoCache, commit: str) -> float:
    for path in (cache.manifest_path(commit), cache.snapshot_dir(commit)):
        try:
            return path.stat().st_mtime
        except OSError:
            continue
    return 0.0


def _folders(path: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in _entries(path) if entry.is_dir())


def _files(path: Path) -> list[Path]:
    return sorted(Path(entry.path) for entry in _entries(path) if entry.is_file(follow_symlinks=False))


def _entries(path: Path) -> list[os.DirEntry[str]]:
    """None for a folder that is not there. Raises OSError where it cannot be read."""
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError as error:
        _raise_unless_gone(error)
        return []
