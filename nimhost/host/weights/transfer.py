"""One file from the hub into the cache: resumed by range, verified by hash, moved into place in one step.

Only the download process uses this: it blocks, one thread per file, and more where a big one comes in parts.
"""

from __future__ import annotations

import os
from pathlib import Path

from nimhost.errors import WeightsCorrupt, WeightsGated, WeightsMissing
from nimhost.host.weights.cache import RepoCache
from nimhost.host.weights.choice import HubFile
from nimhost.host.weights.digest import Digest
from nimhost.host.weights.hub import NETWORK, Hub, Interrupted, Patience, reason
from nimhost.host.weights.locks import lease, locked_partial
from nimhost.host.weights.meter import Meter
from nimhost.host.weights.parts import CHUNK_BYTES, NoRanges, PartedTransfer, write_at


class NoPlainUrl(Exception):
    """The hub has the file in Xet storage only."""


class FileTransfer:
    """Brings one file into the cache. `run` raises NimhostErrors, NoPlainUrl, and OSErrors of the disk."""

    def __init__(self, hub: Hub, cache: RepoCache, commit: str, file: HubFile, meter: Meter) -> None:
        self._hub = hub
        self._cache = cache
        self._file = file
        self._meter = meter
        self._url = hub.file_url(commit, file.path)
        self._blob = cache.blob(file)
        self._partial = cache.partial(file)
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
        self._meter.have(self._file.size_bytes)
        return digest.hex

    def _fetch(self) -> str:
        with locked_partial(self._partial, self._file, self._meter) as fd:
            if self._blob.is_file() and (found := self._check_blob()):  # the one we waited for has fetched it
                return found
            for last in (False, True):
                try:
                    digest = self._fill(fd)
                except (WeightsGated, WeightsMissing, NoPlainUrl):
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
            os.ftruncate(fd, self._file.size_bytes)
            os.fsync(fd)
            os.fchmod(fd, 0o644)
            self._cache.mark_fetched(self._file, self._partial)
            self._partial.replace(self._blob)
            _sync_dir(self._blob.parent)
            return digest.hex

    def _fill(self, fd: int) -> Digest:
        """Fill the file, from where it is, to its size."""
        try:
            if self._ranges and self._file.size_bytes >= 2 * self._hub.limits.part_bytes:
                try:
                    return PartedTransfer(self._hub, self._url, self._file, self._meter, fd).run()
                except NoRanges:
                    self._ranges = False
                    os.ftruncate(fd, 0)
            return self._fill_in_order(fd)
        except WeightsMissing as error:
            raise (NoPlainUrl() if self._file.xet else error) from None

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
            if digest.length and not _continues(response.headers.get("Content-Range"), digest.length):
                self._meter.have(-digest.length)  # the hub sends it all again: so be it
                os.ftruncate(fd, 0)
                digest.restart()
            while left := self._file.size_bytes - digest.length:
                try:
                    chunk = response.read1(min(CHUNK_BYTES, left))
                except NETWORK as error:
                    raise Interrupted(reason(error, self._hub.limits.stall_s)) from error
                if not chunk:
                    raise Interrupted("connection closed early")
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


def _continues(content_range: str | None, start: int) -> bool:
    return (content_range or "").startswith(f"bytes {start}-")


def _sync_dir(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
