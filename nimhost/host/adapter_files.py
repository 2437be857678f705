"""Our copies of adapters, where engines see them: written aside, complete and on the disk before they have their name.

    <root>/<workspace>--<model>/<workspace>--<adapter>@<identity>/  what vLLM is told to load; other content, other name
    <root>/nim/<workspace>--<model>/<workspace>--<adapter>/         where a NIM looks: the name is the adapter's

Only the adapter's own files are in them, readable by everybody (engines have users of their own); what they were made
from is never changed: where the files cannot change under us they are shared by hard links, else copied. All of it
blocks; call it in a thread.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from nimhost.entities import Json
from nimhost.errors import DiskFull, HostError, WeightsMissing
from nimhost.models.adapter import CONFIG, weights_file
from nimhost.refs import Ref, adapter_served_name

NIM = "nim"
_DRAFT = ".incoming-"
_FULL = (errno.ENOSPC, errno.EDQUOT)


class AdapterFiles:
    """`root`: the directory below which every model has one with its adapters."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def identity(self, source: Path) -> str:
        """A name for the adapter files of a directory as they are now: another one when any of them changed.

        Raises WeightsMissing.
        """
        with _translated():
            found = [(name, os.stat(source / name)) for name in adapter_files(source)]
        listed = [(name, s.st_size, s.st_mtime_ns, s.st_ino, s.st_dev) for name, s in found]
        return hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:12]

    def find(self, model: Ref, name: str, identity: str) -> str | None:
        """The copy of that name and content, relative to its model's directory; None while there is none."""
        directory = f"{name}@{identity}"
        return directory if (self._of(model) / directory).is_dir() else None

    def make(self, model: Ref, name: str, identity: str, source: Path, base: str, *, link: bool) -> str:
        """A copy of the adapter in `source` for engines that serve `base` (`base_model_name_or_path`).

        `link`: the files never change where they are. Raises WeightsMissing, DiskFull, HostError.
        """
        directory = f"{name}@{identity}"
        with _translated():
            home = _make_open(self._of(model))
            draft = home / f"{_DRAFT}{secrets.token_hex(8)}"
            try:
                _fill(_make_open(draft), source, base, link)
                _publish(draft, home / directory)
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                raise
        return directory

    def prune(self, keep: Mapping[Ref, Collection[str]], loaded: Collection[str], spared: Collection[str]) -> None:
        """Removes every copy that is neither to be kept (by model), nor `loaded` somewhere, nor of a `spared` adapter.

        Also what a killed daemon left half-done. Directories of models stay: a container may have them mounted.
        """
        with _translated():
            for model, home in _models(self._root).items():
                for copy in _directories(home):
                    kept = copy.name in keep.get(model, ()) or copy.name in loaded
                    if not kept and copy.name.partition("@")[0] not in spared:
                        _remove(copy)

    # --- for NIM

    def shown(self) -> dict[Ref, dict[str, str]]:
        """Model -> the adapters that its NIMs see -> the copy that each of them is, "" for none that there is."""
        with _translated():
            return {
                model: {d.name: self._copy_of(model, d) for d in _directories(home)}
                for model, home in _models(self._root / NIM).items()
            }

    def _copy_of(self, model: Ref, seen: Path) -> str:
        copies = (d for d in _directories(self._of(model)) if d.name.partition("@")[0] == seen.name)
        return next((d.name for d in copies if _same_file(d / CONFIG, seen / CONFIG)), "")

    def show(self, model: Ref, name: str, directory: str) -> None:
        """Puts a copy where the model's NIMs see it. Raises DiskFull, HostError."""
        with _translated():
            home = _make_open(self._shown(model))
            draft = self._of(model) / f"{_DRAFT}{secrets.token_hex(8)}"
            try:
                _make_open(draft)
                for file in (self._of(model) / directory).iterdir():
                    os.link(file, draft / file.name)
                _publish(draft, home / name)
            except BaseException:
                shutil.rmtree(draft, ignore_errors=True)
                raise

    def hide(self, model: Ref, name: str) -> None:
        """A NIM that looks the next time does not serve it any more."""
        with _translated():
            _remove(self._shown(model) / name, _make_open(self._of(model)))

    # ---

    def _of(self, model: Ref) -> Path:
        return self._root / adapter_served_name(model)

    def _shown(self, model: Ref) -> Path:
        return self._root / NIM / adapter_served_name(model)


def adapter_files(source: Path) -> list[str]:
    """The names of the files that make an adapter. Raises WeightsMissing."""
    try:
        names = [path.name for path in source.iterdir()]
    except OSError as error:
        raise WeightsMissing(f"Cannot read {source}: {error.strerror}.") from None
    weights = weights_file(names)
    if CONFIG not in names or weights is None:
        raise WeightsMissing(f"{source} holds no adapter: {CONFIG} or its weights are missing.")
    return [CONFIG, weights]


def _fill(draft: Path, source: Path, base: str, link: bool) -> None:
    config, weights = adapter_files(source)
    try:
        content: Json = json.loads((source / config).read_bytes())
    except (ValueError, RecursionError) as error:
        raise WeightsMissing(f"{source / config} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise WeightsMissing(f"{source / config} is not a JSON object")
    text = json.dumps(content | {"base_model_name_or_path": base}, indent=1).encode()
    _write(draft / config, text)
    original = (source / weights).resolve()
    if not (link and _linked(original, draft / weights)):
        with original.open("rb") as there, (draft / weights).open("wb") as here:
            shutil.copyfileobj(there, here, 1 << 20)
            here.flush()
            os.fsync(here.fileno())
            os.fchmod(here.fileno(), 0o644)


def _linked(original: Path, link: Path) -> bool:
    """Not where it would have to be opened to others, or is on another file system, or not ours to link."""
    if not original.stat().st_mode & 0o004:
        return False
    try:
        os.link(original, link)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EACCES, errno.EOPNOTSUPP):
            return False
        raise
    return True


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
        os.fchmod(file.fileno(), 0o644)


def _publish(draft: Path, place: Path) -> None:
    """Give it its name, all of it on the disk. One that is there already under that name is as good."""
    _sync(draft)
    try:
        draft.rename(place)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        shutil.rmtree(draft)
    _sync(place.parent)


def _remove(directory: Path, aside: Path | None = None) -> None:
    """First out of sight, so that nobody finds half of it."""
    away = (aside or directory.parent) / f"{_DRAFT}{secrets.token_hex(8)}"
    try:
        directory.rename(away)
    except FileNotFoundError:
        return
    shutil.rmtree(away)


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except FileNotFoundError:
        return False


def _make_open(directory: Path) -> Path:
    """The directory, made where it is not, and open to every user's engine whatever the umask says.

    Somebody else may make it at the same time, for another adapter.
    """
    if not directory.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o755)
    return directory


def _models(place: Path) -> dict[Ref, Path]:
    """Model -> its directory below `place`."""
    homes = [home for home in _directories(place) if "--" in home.name]
    return {Ref(*home.name.split("--", 1)): home for home in homes}


def _directories(place: Path) -> list[Path]:
    try:
        return sorted(path for path in place.iterdir() if path.is_dir())
    except FileNotFoundError:
        return []


def _sync(directory: Path) -> None:
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise DiskFull("The disk that holds the adapters is full.", "Free some space.") from error
        if isinstance(error, FileNotFoundError):
            raise WeightsMissing(f"{error.filename} went away.") from error
        raise HostError(f"Cannot write the adapter: {error.strerror} ({error.filename}).") from error
