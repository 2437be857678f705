"""The hash that a registry promises for a file, computed as its bytes come."""

from __future__ import annotations

import hashlib

from nimhost.host.weights.choice import HubFile


class Digest:
    """SHA-256 for LFS files, git's SHA-1 of a blob for the others; SHA-256, too, where none is promised."""

    def __init__(self, file: HubFile) -> None:
        self._file = file
        self.restart()

    def restart(self) -> None:
        self.length = 0
        if len(self._file.digest) == 40:
            self._hash = hashlib.sha1(b"blob %d\0" % self._file.size_bytes, usedforsecurity=False)
        else:
            self._hash = hashlib.sha256()

    def update(self, chunk: bytes) -> None:
        self._hash.update(chunk)
        self.length += len(chunk)

    @property
    def hex(self) -> str:
        return self._hash.hexdigest()

    def matches(self) -> bool:
        """Where no hash is promised, the size is all there is to compare."""
        return self.length == self._file.size_bytes and (not self._file.hashed or self.hex == self._file.digest)
