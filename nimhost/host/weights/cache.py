"""The weights on disk: one cache in the layout of Hugging Face (`blobs`, `refs`, `snapshots`), shared with other tools.

What nimhost adds lies in `<cache>/.nimhost/<repository>/`: `<commit>.json`, a manifest of every file it wants, with
size, hash and whether it was verified, and `fetched/<blob>`, a note for each blob that nimhost brought here. A
snapshot is complete when its manifest is there and every file has its size; so a partial snapshot is never taken for
a complete one, and looking needs no network. What comes from NGC lies in `<cache>/.nimhost/ngc/`, in the same layout.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from types import MappingProxyType

import msgspec
from msgspec import Struct

from nimhost.errors import HostError, WeightsMissing
from nimhost.host.weights.choice import HubFile, is_weights, wanted
from nimhost.host.weights.wire import LATEST, Repo
from nimhost.models.tensors import header_length, parse_safetensors_header, weights_end

OURS = ".nimhost"
PARTIAL = ".nimhost-partial"
STAGE = ".nimhost-xet"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_USED_EVERY_S = 3600.0
LONGEST_PATH = 1024
NOWHERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)


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
    recorded: str = ""
    """The SHA-256 of what came, where no hash was promised."""
    damaged: bool = False
    """It has been looked at since, and its bytes are others."""


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
        ngc = repo.registry == "ngc"
        self.folder = f"{'ngc-' if ngc else ''}{repo.repo_type}s--" + repo.repo_id.replace("/", "--")
        self.dir = cache_dir / OURS / "ngc" / self.folder if ngc else cache_dir / self.folder
        self.blobs = self.dir / "blobs"
        self.notes = cache_dir / OURS / self.folder
        self.fetched = self.notes / "fetched"

    def commit(self) -> str | None:
        """The commit that the revision stood for when it was last fetched."""
        if _COMMIT.fullmatch(self.repo.revision) or (self.repo.registry == "ngc" and self.repo.revision != LATEST):
            return self.repo.revision
        said = (_read(self.dir / "refs" / self.repo.revision) or b"").decode(errors="replace").strip()
        sound = is_version(said) if self.repo.registry == "ngc" else _COMMIT.fullmatch(said)
        return said if sound else None  # it becomes part of a path

    def snapshot_dir(self, commit: str) -> Path:
        return self.dir / "snapshots" / commit

    def blob(self, file: HubFile) -> Path:
        return self.blobs / file.digest

    def partial(self, file: HubFile) -> Path:
        return self.blobs / (file.digest + PARTIAL)

    def stage(self, file: HubFile) -> Path:
        """A directory for what comes through Xet."""
        return self.blobs / (file.digest + STAGE)

    def manifest_path(self, commit: str) -> Path:
        return self.notes / f"{commit}.json"

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
            whole = self._holds(commit, manifest.files) and not any(file.damaged for file in manifest.files)
            return self._snapshot(commit, manifest.size_bytes) if whole else None
        listed = self._listing_of_others(commit)
        if listed is not None:
            size = sum(file.size_bytes for file in listed)
            return self._snapshot(commit, size) if self._holds(commit, listed) else None
        if trust_others and looks_complete(self.snapshot_dir(commit)):
            return self._snapshot(commit, sum(f.size_bytes for f in self.files_there(commit)))
        return None

    def some(self, commit: str) -> Snapshot:
        """What is there of a snapshot, whole or not."""
        return self._snapshot(commit, sum(file.size_bytes for file in self.files_there(commit)))

    def _holds(self, commit: str, files: Iterable[ManifestFile | HubFile]) -> bool:
        root = self.snapshot_dir(commit)
        return all(_size(root / file.path) == file.size_bytes for file in files)

    def _listing_of_others(self, commit: str) -> list[HubFile] | None:
        """What the newer Hugging Face tools noted about the repository, reduced to what we would have fetched."""
        try:
            files = json.loads(_read(self.dir / "trees" / f"{commit}.json") or b"null")["files"]
            tree = [HubFile(path, f["size"], f.get("lfs_sha256") or f["blob_id"]) for path, f in files.items()]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return None
        chosen = wanted(tree, self.repo.repo_type)
        has_weights = self.repo.repo_type != "model" or any(is_weights(file.path) for file in chosen)
        return chosen if has_weights else None

    def files_there(self, commit: str) -> list[HubFile]:
        """The files of a snapshot that another tool made; digests are the names of their blobs."""
        root = self.snapshot_dir(commit)
        found = []
        for path in sorted(path for path in root.rglob("*") if path.is_file()):
            digest = os.path.basename(os.readlink(path)) if path.is_symlink() else ""
            found.append(HubFile(str(path.relative_to(root)), _size(path), digest))
        return found

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
        for folder in (self.dir, self.blobs, self.fetched):
            folder.mkdir(parents=True, exist_ok=True)
        for folder in (self.dir, self.blobs):
            _open_to_all(folder, 0o755)

    def remove_empty_dirs(self) -> None:
        """After a refusal: what nothing came into."""
        for folder in (self.blobs, self.fetched, self.dir):
            with suppress(OSError):  # it is not empty, or not there
                folder.rmdir()

    def mark_fetched(self, file: HubFile, path: Path) -> None:
        """Note that a blob is nimhost's doing: what others brought here is never pruned. The note is of this very file,
        not of one that another tool may put there later. `path`: where it is now, with all of its content."""
        write_atomically(self.fetched / file.digest, _mark(path).encode())

    def fetched_digests(self) -> set[str]:
        """Names of the blobs that nimhost brought here. One that was changed in its place is still the same file: where
        it is known to be damaged, nobody else can have brought it since."""
        notes = {path.name: (_read(path) or b"").decode(errors="replace") for path in self.fetched.glob("*")}
        marks = {name: (note, _mark(self.blobs / name)) for name, note in notes.items() if note}
        ours = {name for name, (note, mark) in marks.items() if note == mark}
        touched = {name for name, (note, mark) in marks.items() if mark and _inode(note) == _inode(mark)} - ours
        return ours | (touched & self._damaged_digests() if touched else touched)

    def _damaged_digests(self) -> set[str]:
        manifests = [self.manifest(path.stem) for path in self.notes.glob("*.json")]
        return {file.digest for manifest in manifests if manifest for file in manifest.files if file.damaged}

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
            self._refer(self.dir / "refs" / self.repo.revision, commit)
        known = self.dir / "refs" / self.repo.branch if self.repo.branch else None
        if known is not None and not known.exists():  # another tool may know a newer commit
            self._refer(known, commit)

    def _refer(self, ref: Path, commit: str) -> None:
        """Nothing else may ever be in `refs`, not even for a moment: other tools take it for a branch."""
        write_atomically(ref, commit.encode(), scratch=self.dir)

    def write_manifest(
        self, commit: str, files: Iterable[HubFile], *, verified: bool, hashes: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """`hashes`: by digest, what was computed of the files that came."""
        listed = [
            ManifestFile(
                f.path, f.size_bytes, f.digest, verified and f.hashed, "" if f.hashed else hashes.get(f.digest, "")
            )
            for f in files
        ]
        self.replace_manifest(Manifest(self.repo.repo_id, commit, listed))

    def replace_manifest(self, manifest: Manifest) -> None:
        write_atomically(self.manifest_path(manifest.commit), msgspec.json.encode(manifest))


def looks_complete(snapshot: Path) -> bool:
    """Whether a snapshot without any listing has a config and all the weights it speaks of.

    Every file that the index names and every part of `-00001-of-00002` must be there, and every safetensors file as
    long as its own header says.
    """
    safe = {path.name for path in snapshot.glob("*.safetensors")}
    indexes = [*snapshot.glob("*.safetensors.index.json")] or ([] if safe else [*snapshot.glob("*.bin.index.json")])
    try:
        named = {str(name) for index in indexes for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError):
        return False
    there = safe or {path.name for path in snapshot.glob("*.bin")}
    has_config = (snapshot / "config.json").is_file() or (snapshot / "adapter_config.json").is_file()
    return has_config and bool(there) and _all_parts(there) and all(_whole(snapshot / name) for name in named | there)


def _all_parts(names: set[str]) -> bool:
    """Whether there are as many parts as one says: `-00001-of-00002` is one of two."""
    parts = (re.fullmatch(r"(.*-)\d+-of-(\d+)(\..*)", name) for name in names)
    return all(count == int(last) for (_, last, _), count in Counter(part.groups() for part in parts if part).items())


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
    """Whether a path that the hub sent stays inside the snapshot, and can be that of a file."""
    parts = PurePosixPath(path).parts if len(path) <= LONGEST_PATH else ()
    return bool(parts) and not path.startswith("/") and ".." not in parts and "\0" not in path


def is_version(text: str) -> bool:
    """Whether it can be the version of an NGC artifact: it becomes part of a path."""
    return bool(re.fullmatch(r"[\w.+@=-]+", text)) and not text.startswith(".")


def write_atomically(path: Path, content: bytes, scratch: Path | None = None) -> None:
    """`scratch`: the folder it is made in, on the same file system; None: its own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = (scratch or path.parent) / f"{path.name}.{secrets.token_hex(4)}.tmp"  # others may write it as well
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _check(repo: Repo) -> None:
    if repo.registry == "ngc":
        _check_ngc(repo)
        return
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo.repo_id) or ".." in repo.repo_id:
        raise WeightsMissing(f"'{repo.repo_id}' is not a repository name", "Write it as ORGANISATION/NAME.")
    if repo.repo_type not in ("model", "dataset", "space"):
        raise WeightsMissing(f"'{repo.repo_type}' is not a repository type", "One of model, dataset, space.")
    for revision in (repo.revision, repo.branch or "main"):
        if not is_safe_path(revision):
            raise WeightsMissing(f"'{revision}' is not a revision", "Name a branch, a tag or a commit.")


def _check_ngc(repo: Repo) -> None:
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+){2}", repo.repo_id) or ".." in repo.repo_id or "--" in repo.repo_id:
        raise WeightsMissing(f"'{repo.repo_id}' is not the name of an NGC artifact", "It is made of org/team/name.")
    if not is_version(repo.revision):
        raise WeightsMissing(f"'{repo.revision}' is not a version", "Name a version of the artifact, such as 1.0.")


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


def _mark(path: Path) -> str:
    """Of a file as it is: file systems give the inode of a deleted one to the next, but not its time as well."""
    found = stat_of(path)
    return f"{found.st_ino} {found.st_mtime_ns}" if found else ""


def _inode(mark: str) -> str:
    return mark.partition(" ")[0]


def _size(path: Path) -> int:
    found = stat_of(path)
    return found.st_size if found else -1


def stat_of(path: Path) -> os.stat_result | None:
    """None for what is not there, or not any more, and for a link that leads nowhere."""
    try:
        return path.stat()
    except OSError as error:
        if error.errno in NOWHERE:
            return None
        raise
