"""The weights on disk: one cache in the layout of Hugging Face (`blobs`, `refs`, `snapshots`), shared with other tools.

What nimhost adds lies in `<cache>/.nimhost/<repository>/<commit>.json`: a manifest of every file it wants, with size,
hash and whether it was verified. A snapshot is ours when its manifest is there and every file has its size; so a
partial snapshot is never taken for a complete one, and looking needs no network.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

import msgspec
from msgspec import Struct

from nimhost.errors import HostError, WeightsMissing
from nimhost.host.weights_choice import HubFile, is_weights, wanted
from nimhost.host.weights_wire import Repo
from nimhost.models.checkpoint import header_length, parse_safetensors_header, weights_end

OURS = ".nimhost"
PARTIAL = ".nimhost-partial"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_USED_EVERY_S = 3600.0


class Snapshot(Struct, frozen=True):
    """Complete weights. Mount `repo_dir` read-only and point the engine at `path` inside it, whose links lead there."""

    repo_dir: str
    path: str
    commit: str
    size_bytes: int


class ManifestFile(Struct, frozen=True):
    path: str
    size_bytes: int
    digest: str
    verified: bool
    """Its bytes had this digest when the manifest was written."""


class Manifest(Struct, frozen=True):
    """Its modification time is when the snapshot was last used, to an hour."""

    repo_id: str
    commit: str
    files: list[ManifestFile]

    @property
    def size_bytes(self) -> int:
        return sum(file.size_bytes for file in self.files)


def cache_dir_from(env: Mapping[str, str]) -> Path:
    """Where Hugging Face's tools keep their cache under these environment variables."""
    home = env.get("XDG_CACHE_HOME") or str(Path(env.get("HOME") or Path.home()) / ".cache")
    hf_home = env.get("HF_HOME") or str(Path(home) / "huggingface")
    chosen = env.get("HF_HUB_CACHE") or env.get("HUGGINGFACE_HUB_CACHE") or str(Path(hf_home) / "hub")
    return Path(chosen).expanduser().absolute()


class RepoCache:
    """One repository's part of the cache."""

    def __init__(self, cache_dir: Path, repo: Repo) -> None:
        _check(repo)
        self.cache_dir = cache_dir
        self.repo = repo
        self.folder = f"{repo.repo_type}s--" + repo.repo_id.replace("/", "--")
        self.dir = cache_dir / self.folder
        self.blobs = self.dir / "blobs"

    def commit(self) -> str | None:
        """The commit that the revision stood for when it was last fetched."""
        if _COMMIT.fullmatch(self.repo.revision):
            return self.repo.revision
        text = _read(self.dir / "refs" / self.repo.revision)
        return text.decode().strip() if text else None

    def snapshot_dir(self, commit: str) -> Path:
        return self.dir / "snapshots" / commit

    def blob(self, file: HubFile) -> Path:
        return self.blobs / file.digest

    def partial(self, file: HubFile) -> Path:
        return self.blobs / (file.digest + PARTIAL)

    def manifest_path(self, commit: str) -> Path:
        return self.cache_dir / OURS / self.folder / f"{commit}.json"

    def manifest(self, commit: str) -> Manifest | None:
        data = _read(self.manifest_path(commit))
        try:
            return msgspec.json.decode(data, type=Manifest) if data else None
        except msgspec.MsgspecError:
            return None  # unreadable: as good as absent, the next fetch verifies and writes it anew

    # --- looking ---------------------------------------------------------------------------------------------------

    def find(self, *, trust_others: bool = False) -> Snapshot | None:
        """The snapshot, if everything it needs is there. Reads a few small files and sizes, never the network.

        `trust_others`: accept what another tool fetched without saying how large its files must be.
        """
        commit = self.commit()
        if commit is None or not self.snapshot_dir(commit).is_dir():
            return None
        manifest = self.manifest(commit)
        if manifest is not None:
            return self._snapshot(commit, manifest.size_bytes) if self._holds(commit, manifest.files) else None
        listed = self._listing_of_others(commit)
        if listed is not None:
            size = sum(file.size_bytes for file in listed)
            return self._snapshot(commit, size) if self._holds(commit, listed) else None
        if trust_others and looks_complete(self.snapshot_dir(commit)):
            return self._snapshot(commit, sum(f.size_bytes for f in self.files_there(commit)))
        return None

    def _holds(self, commit: str, files: Iterable[ManifestFile | HubFile]) -> bool:
        root = self.snapshot_dir(commit)
        return all(_size(root / file.path) == file.size_bytes for file in files)

    def _listing_of_others(self, commit: str) -> list[HubFile] | None:
        """What the newer Hugging Face tools noted about the repository, reduced to what we would have fetched."""
        try:
            files = json.loads(_read(self.dir / "trees" / f"{commit}.json") or b"null")["files"]
            tree = [HubFile(path, f["size"], f.get("lfs_sha256") or f["blob_id"]) for path, f in files.items()]
        except (ValueError, KeyError, TypeError, AttributeError):
            return None
        chosen = wanted(tree, self.repo.repo_type)
        has_weights = self.repo.repo_type != "model" or any(is_weights(file.path) for file in chosen)
        return chosen if has_weights else None

    def files_there(self, commit: str) -> list[HubFile]:
        """The files of a snapshot that another tool made; digests are the names of their blobs."""
        root = self.snapshot_dir(commit)
        found = sorted(path for path in root.rglob("*") if path.is_file())
        return [
            HubFile(
                str(path.relative_to(root)),
                path.stat().st_size,
                os.path.basename(os.readlink(path)) if path.is_symlink() else "",
            )
            for path in found
        ]

    def _snapshot(self, commit: str, size_bytes: int) -> Snapshot:
        path = self.snapshot_dir(commit).absolute()
        return Snapshot(str(self._mount_root(path)), str(path), commit, size_bytes)

    def _mount_root(self, path: Path) -> Path:
        """The folder that holds the snapshot and all its links lead to: the repository's, or, where another tool keeps
        blobs in the store that newer Hugging Face versions share between repositories, the whole cache."""
        home = os.path.realpath(self.dir)
        inside = all(os.path.realpath(p).startswith(home + os.sep) for p in path.rglob("*") if p.is_symlink())
        return (self.dir if inside else self.cache_dir).absolute()

    def mark_used(self, commit: str) -> None:
        path = self.manifest_path(commit)
        try:
            if time.time() - path.stat().st_mtime > _USED_EVERY_S:
                os.utime(path)
        except OSError:
            pass  # another tool's snapshot, or a cache that we may only read: nothing of ours to note it in

    # --- writing ---------------------------------------------------------------------------------------------------

    def make_dirs(self) -> None:
        for folder in (self.dir, self.blobs, self.manifest_path("x").parent):
            folder.mkdir(parents=True, exist_ok=True)
        for folder in (self.dir, self.blobs):
            _open_to_all(folder, 0o755)

    def link(self, commit: str, files: Iterable[HubFile]) -> None:
        """Make the snapshot: relative links to the blobs, as Hugging Face's own tools would."""
        root = self.snapshot_dir(commit)
        for file in files:
            link = root / file.path
            link.parent.mkdir(parents=True, exist_ok=True)
            target = os.path.relpath(self.blob(file), link.parent)
            if not (link.is_symlink() and os.readlink(link) == target):
                _replace_link(link, target)
            _open_to_all(self.blob(file), 0o644)
        for folder in (root.parent, root, *(p for p in root.rglob("*") if p.is_dir())):
            _open_to_all(folder, 0o755)

    def write_ref(self, commit: str) -> None:
        if self.repo.revision != commit:
            write_atomically(self.dir / "refs" / self.repo.revision, commit.encode())
        known = self.dir / "refs" / self.repo.branch if self.repo.branch else None
        if known is not None and not known.exists():  # another tool may know a newer commit
            write_atomically(known, commit.encode())

    def write_manifest(self, commit: str, files: Iterable[HubFile], *, verified: bool) -> None:
        listed = [ManifestFile(f.path, f.size_bytes, f.digest, verified) for f in files]
        manifest = Manifest(self.repo.repo_id, commit, listed)
        write_atomically(self.manifest_path(commit), msgspec.json.encode(manifest))


def looks_complete(snapshot: Path) -> bool:
    """Whether a snapshot without any listing has a config and all the weights it speaks of.

    Every file that the index names and every part of `-00001-of-00002` must be there, and every safetensors file as
    long as its own header says.
    """
    safe = {path.name for path in snapshot.glob("*.safetensors")}
    indexes = [*snapshot.glob("*.safetensors.index.json")] or ([] if safe else [*snapshot.glob("*.bin.index.json")])
    try:
        named = {name for index in indexes for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError):
        return False
    there = safe or {path.name for path in snapshot.glob("*.bin")}
    has_config = (snapshot / "config.json").is_file() or (snapshot / "adapter_config.json").is_file()
    return has_config and bool(there) and all(_whole(snapshot / name) for name in named | _parts(there))


def _parts(names: set[str]) -> set[str]:
    """These files, and the other parts where one is a part: `-00001-of-00002` has a `-00002-of-00002`."""
    parts = set(names)
    for name in names:
        if match := re.fullmatch(r"(.*-)(\d+)-of-(\d+)(\..*)", name):
            start, digits, last, end = match[1], len(match[2]), match[3], match[4]
            parts |= {f"{start}{n:0{digits}}-of-{last}{end}" for n in range(1, int(last) + 1)}
    return parts


def _whole(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return path.is_file()
    try:
        with path.open("rb") as file:
            length = header_length(file.read(8))
            header = parse_safetensors_header(file.read(length))
        return path.stat().st_size == 8 + length + weights_end(header)
    except (OSError, ValueError):
        return False


def is_safe_path(path: str) -> bool:
    """Whether a path that the hub sent stays inside the snapshot."""
    parts = PurePosixPath(path).parts
    return bool(parts) and not path.startswith("/") and ".." not in parts and "\0" not in path


def write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _check(repo: Repo) -> None:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo.repo_id) or ".." in repo.repo_id:
        raise WeightsMissing(f"'{repo.repo_id}' is not a repository name", "Write it as ORGANISATION/NAME.")
    if repo.repo_type not in ("model", "dataset", "space"):
        raise WeightsMissing(f"'{repo.repo_type}' is not a repository type", "One of model, dataset, space.")
    if not is_safe_path(repo.revision) or not is_safe_path(repo.branch or "main"):
        raise WeightsMissing(f"'{repo.branch or repo.revision}' is not a revision", "Name a branch, a tag or a commit.")


def _replace_link(link: Path, target: str) -> None:
    temporary = link.with_name(f".{link.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    temporary.replace(link)


def _open_to_all(path: Path, mode: int) -> None:
    """NIM runs as uid 1000: what we mount must be readable by everybody. Raises HostError where we may not."""
    if path.stat().st_mode & mode == mode:
        return
    try:
        path.chmod(path.stat().st_mode & 0o777 | mode)
    except PermissionError as error:
        raise HostError(
            f"{path} is not readable by everybody, and it is not ours to change",
            f"As its owner: chmod -R a+rX {path}",
        ) from error


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except (FileNotFoundError, NotADirectoryError):
        return -1
