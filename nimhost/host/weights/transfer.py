"""One file from the hub into the cache: resumed by range, verified by hash, moved into place in one step.

Only the download process uses this: it blocks, one thread per file, and more where a big one comes in parts.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from nimhost.errors import NimhostError, WeightsCorrupt, WeightsMissing
from nimhost.host.weights.cache import RepoCache
from nimhost.host.weights.choice import HubFile
from nimhost.host.weights.digest import Digest
from nimhost.host.weights.hub import Hub, Interrupted, Patience
from nimhost.host.weights.locks import lease, locked_partial
from nimhost.host.weights.meter import Meter
from nimhost.host.weights.parts import CHUNK_BYTES, NoRanges, PartedTransfer, arrived_bytes, write_at

ThroughXet = Callable[[HubFile, Meter, Path], Path]
"""Brings a file that the hub has in Xet storage only into a directory of ours: see `xet.bring`."""


class FileTransfer:
    """Brings one file into the cache. `run` raises NimhostErrors, and OSErrors of the disk."""

    def __init__(
        self, hub: Hub, cache: RepoCache, commit: str, file: HubFile, meter: Meter, through_xet: ThroughXet
    ) -> None:
        self._hub = hub
        self._cache = cache
        self._file = file
        self._meter = meter
        self._url = hub.file_url(commit, file.path)
        self._blob = cache.blob(file)
        self._partial = cache.partial(file)
        self._stage = cache.stage(file)
        self._through_xet = through_xet
        self._ranges = True

    def run(self) -> str:
        """The hash of what is in the cache then."""
        try:
            with lease(self._cache, self._file, self._meter):
                return self._check_blob() or self._fetch()
        finally:
            self._say("")

    def _check_blob(self) -> str | None:
        """The hash of the blob if it is there and right, whoever fetched it."""
        if not self._blob.is_file() or self._blob.stat().st_size != self._file.size_bytes:
            return None
        self._say(f"verifying {self._file.path}")
        digest = digest_of(self._blob, self._file)
        if not digest.matches():
            return None
        self._partial.unlink(missing_ok=True)
        shutil.rmtree(self._stage, ignore_errors=True)
        self._meter.have(self._file.size_bytes)
        return digest.hex

    def _fetch(self) -> str:
        with locked_partial(self._partial, self._file, self._meter) as fd:
            if self._blob.is_file() and (found := self._check_blob()):  # the one we waited for has fetched it
                return found
            for last in (False, True):
                try:
                    content, digest = self._fill(fd)
                except NimhostError:
                    if not os.fstat(fd).st_size:
                        self._partial.unlink()
                    raise
                if digest.matches():
                    break
                self._meter.have(-self._file.size_bytes)
                os.ftruncate(fd, 0)
                if last:
                    raise WeightsCorrupt(
                        f"{self._file.path} of {self._hub.repo} has not the hash that the hub promises, twice",
                        "A proxy or mirror in between may change it. Try again, or set [weights] endpoint.",
                    )
                self._say(f"{self._file.path} arrived damaged, fetching it again")
            self._move_in(content)
            return digest.hex

    def _move_in(self, content: Path) -> None:
        os.truncate(content, self._file.size_bytes)
        content.chmod(0o644)
        _sync(content)
        self._cache.mark_fetched(self._file, content)
        content.replace(self._blob)
        _sync(self._blob.parent)
        if content != self._partial:
            self._partial.unlink(missing_ok=True)
            shutil.rmtree(self._stage, ignore_errors=True)

    def _fill(self, fd: int) -> tuple[Path, Digest]:
        """Where all of its content is then, and the hash of that."""
        try:
            return self._partial, self._fill_partial(fd)
        except WeightsMissing:
            if not self._file.xet:
                raise
        self._meter.have(-arrived_bytes(self._partial, self._file.size_bytes))
        os.ftruncate(fd, 0)
        with self._hub.slots:
            content = self._through_xet(self._file, self._meter, self._stage)
        self._say(f"verifying {self._file.path}")
        return content, digest_of(content, self._file)

    def _fill_partial(self, fd: int) -> Digest:
        """Fill the file, from where it is, to its size."""
        if self._ranges and self._file.size_bytes >= 2 * self._hub.limits.part_bytes:
            try:
                return PartedTransfer(self._hub, self._url, self._file, self._meter, fd).run()
            except NoRanges:
                self._ranges = False
                os.ftruncate(fd, 0)
        return self._fill_in_order(fd)

    def _fill_in_order(self, fd: int) -> Digest:
        digest = self._resume(fd)
        patience = Patience(self._hub, self._say)
        while digest.length < self._file.size_bytes:
            before = digest.length
            try:
                with self._hub.slots:
                    self._stream(fd, digest)
            except Interrupted as failure:
                if digest.length > before:
                    patience.progressed()
                patience.wait(failure)
        return digest

    def _resume(self, fd: int) -> Digest:
        """Hash what an earlier process left; the file's size is how far it came."""
        digest = Digest(self._file)
        if os.fstat(fd).st_size > self._file.size_bytes:
            os.ftruncate(fd, 0)
        if os.fstat(fd).st_size:
            self._say(f"verifying what is there of {self._file.path}")
        while chunk := os.pread(fd, CHUNK_BYTES, digest.length):
            digest.update(chunk)
        self._meter.have(digest.length)
        self._say("")
        return digest

    def _stream(self, fd: int, digest: Digest) -> None:
        """Append what one request brings. Raises Interrupted when it ends early."""
        with self._hub.open(self._url, digest.length) as response:
            if not self._hub.sends_part(response, digest.length, self._file.size_bytes) and digest.length:
                self._meter.have(-digest.length)  # the hub sends it all again: so be it
                os.ftruncate(fd, 0)
                digest.restart()
            while left := self._file.size_bytes - digest.length:
                chunk = self._hub.chunk(response, min(CHUNK_BYTES, left))
                write_at(fd, chunk, digest.length)
                digest.update(chunk)
                self._meter.receive(len(chunk))
                self._say("")

    def _say(self, text: str) -> None:
        self._meter.note(self._file.path, text)


def digest_of(path: Path, file: HubFile) -> Digest:
    """What is in a file of the cache, to compare with what was promised."""
    digest = Digest(file)
    with path.open("rb") as content:
        while chunk := content.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
