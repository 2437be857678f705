"""One big file over several connections: parts fetched side by side, each resumed where it stopped.

The partial file holds the file's bytes, where they belong, and after them a table of how far each part is. The table
is written after the bytes that it speaks of, so a killed process loses at most one chunk per connection.
"""

from __future__ import annotations

import os
import struct
import threading
from pathlib import Path

from nimhost.host.weights.choice import HubFile
from nimhost.host.weights.digest import Digest
from nimhost.host.weights.hub import Hub, Interrupted, Patience
from nimhost.host.weights.meter import Meter

CHUNK_BYTES = 1 << 20
MOST_PARTS = 64
_MAGIC = b"nimhost1"
_HEAD = struct.Struct("<8sQ")
_DONE = struct.Struct("<Q")


class NoRanges(Exception):
    """Whoever has the file sends all of it, whatever range is asked for."""


class Parts:
    """The table at the end of a partial file. `done`: bytes there of each part. Its file must be locked."""

    def __init__(self, fd: int, size_bytes: int, part_bytes: int, done: list[int]) -> None:
        self.fd = fd
        self.size_bytes = size_bytes
        self.part_bytes = part_bytes
        self.done = done

    @classmethod
    def open(cls, fd: int, size_bytes: int, wanted_part_bytes: int) -> Parts:
        """The table that is there, else a new one, which counts what a single connection has brought before."""
        if (found := cls.read(fd, size_bytes)) is not None:
            return found
        part_bytes = max(wanted_part_bytes, -(-size_bytes // MOST_PARTS))
        there = os.fstat(fd).st_size
        prefix = there if there <= size_bytes else 0
        starts = range(0, size_bytes, part_bytes)
        done = [min(max(prefix - start, 0), part_bytes, size_bytes - start) for start in starts]
        os.ftruncate(fd, size_bytes + _HEAD.size + len(done) * _DONE.size)
        table = b"".join((_HEAD.pack(_MAGIC, part_bytes), *map(_DONE.pack, done)))
        os.pwrite(fd, table, size_bytes)
        return cls(fd, size_bytes, part_bytes, done)

    @classmethod
    def read(cls, fd: int, size_bytes: int) -> Parts | None:
        """The table; None where there is none, or one that makes no sense."""
        table = os.pread(fd, _HEAD.size + MOST_PARTS * _DONE.size, size_bytes)
        if len(table) < _HEAD.size:
            return None
        magic, part_bytes = _HEAD.unpack_from(table)
        if magic != _MAGIC or part_bytes * MOST_PARTS < size_bytes:
            return None
        lengths = [min(part_bytes, size_bytes - start) for start in range(0, size_bytes, part_bytes)]
        if len(table) != _HEAD.size + len(lengths) * _DONE.size:
            return None
        done = [value for (value,) in _DONE.iter_unpack(table[_HEAD.size :])]
        sound = all(value <= length for value, length in zip(done, lengths, strict=True))
        return cls(fd, size_bytes, part_bytes, done) if sound else None

    def start(self, part: int) -> int:
        return part * self.part_bytes

    def stop(self, part: int) -> int:
        return min(self.start(part) + self.part_bytes, self.size_bytes)

    def is_full(self, part: int) -> bool:
        return self.start(part) + self.done[part] == self.stop(part)

    @property
    def arrived_bytes(self) -> int:
        return sum(self.done)

    @property
    def prefix_bytes(self) -> int:
        """How much there is without a gap, from the beginning."""
        part = next((n for n in range(len(self.done)) if not self.is_full(n)), None)
        return self.size_bytes if part is None else self.start(part) + self.done[part]

    def write(self, fd: int, part: int, chunk: bytes) -> None:
        """Append to a part: the bytes first, then the note that they are there."""
        write_at(fd, chunk, self.start(part) + self.done[part])
        done = self.done[part] + len(chunk)
        os.pwrite(fd, _DONE.pack(done), self.size_bytes + _HEAD.size + part * _DONE.size)
        self.done[part] = done


def write_at(fd: int, chunk: bytes, offset: int) -> None:
    view = memoryview(chunk)
    while view:
        written = os.pwrite(fd, view, offset)
        offset, view = offset + written, view[written:]


def arrived_bytes(partial: Path, size_bytes: int) -> int:
    """How much of a file of that size a partial file holds; 0 when there is none."""
    try:
        fd = os.open(partial, os.O_RDONLY)
    except FileNotFoundError:
        return 0
    try:
        parts = Parts.read(fd, size_bytes)
        there = os.fstat(fd).st_size
        return parts.arrived_bytes if parts else there if there <= size_bytes else 0
    finally:
        os.close(fd)


class PartedTransfer:
    """Fills a partial file. Hashes the bytes in their order while later ones are still coming."""

    def __init__(self, hub: Hub, url: str, file: HubFile, meter: Meter, fd: int) -> None:
        self._hub = hub
        self._url = url
        self._file = file
        self._meter = meter
        self._parts = Parts.open(fd, file.size_bytes, hub.limits.part_bytes)
        self._waiting = [n for n in range(len(self._parts.done)) if not self._parts.is_full(n)]
        self._moved = threading.Condition()
        self._failure: BaseException | None = None
        self._threads: list[threading.Thread] = []

    def run(self) -> Digest:
        """The hash of the whole file once it is there. Raises what its connections ran into; they end by themselves,
        and keep the file locked until they have.

        Raises NoRanges after they have ended.
        """
        self._meter.have(self._parts.arrived_bytes)
        if not self._waiting:
            self._meter.note(self._file.path, f"verifying {self._file.path}")
        for number in range(min(self._hub.limits.parallel, len(self._waiting))):
            thread = threading.Thread(target=self._work, args=(os.dup(self._parts.fd), number), daemon=True)
            self._threads.append(thread)
            thread.start()
        try:
            return self._hash()
        except NoRanges:
            for thread in self._threads:
                thread.join()
            self._meter.have(-self._parts.arrived_bytes)
            raise

    def _hash(self) -> Digest:
        digest = Digest(self._file)
        while digest.length < self._file.size_bytes:
            with self._moved:
                while (until := self._parts.prefix_bytes) == digest.length and self._failure is None:
                    self._moved.wait()
                if self._failure is not None:
                    raise self._failure
            while digest.length < until:
                chunk = os.pread(self._parts.fd, min(CHUNK_BYTES, until - digest.length), digest.length)
                digest.update(chunk)
        self._meter.note(self._file.path)
        return digest

    def _work(self, fd: int, number: int) -> None:
        """One connection: the next part, until there is none."""
        who = f"{self._file.path} #{number}"
        try:
            while (part := self._take()) is not None:
                self._fill(fd, part, who)
        except BaseException as error:  # noqa: BLE001  it is raised again where the file is waited for
            with self._moved:
                self._failure = self._failure or error
                self._moved.notify()
        finally:
            self._meter.note(who)
            os.close(fd)

    def _take(self) -> int | None:
        with self._moved:
            return self._waiting.pop(0) if self._waiting and self._failure is None else None

    def _fill(self, fd: int, part: int, who: str) -> None:
        patience = Patience(self._hub, lambda text: self._meter.note(who, text))
        while not self._parts.is_full(part):
            before = self._parts.done[part]
            try:
                with self._hub.slots:
                    self._stream(fd, part, who)
            except Interrupted as failure:
                if self._parts.done[part] > before:
                    patience.progressed()
                patience.wait(failure)
            if self._failure is not None:
                return

    def _stream(self, fd: int, part: int, who: str) -> None:
        """What one request brings. Raises Interrupted when it ends early, NoRanges for all of the file."""
        parts, stop = self._parts, self._parts.stop(part)
        start = parts.start(part) + parts.done[part]
        with self._hub.open(self._url, start, stop) as response:
            if not self._hub.sends_part(response, start, parts.size_bytes):
                raise NoRanges
            while left := stop - parts.start(part) - parts.done[part]:
                chunk = self._hub.chunk(response, min(CHUNK_BYTES, left))
                parts.write(fd, part, chunk)
                self._meter.receive(len(chunk))
                self._meter.note(who)
                with self._moved:
                    self._moved.notify()
                if self._failure is not None:
                    return
