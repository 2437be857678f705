"""The Xet protocol, version 1 (https://huggingface.co/docs/xet), well enough for `hf_xet` itself: one xorb per file,
nothing compressed."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from typing import Any

TOKEN = "xet-read-token"
CHUNK_BYTES = 64 * 1024
HEADER_BYTES = 8


def xorb_of(content: bytes) -> bytes:
    """Its chunks, each with its header: version, length, compression (none), length of what it unpacks to."""
    chunks = [content[start : start + CHUNK_BYTES] for start in range(0, len(content), CHUNK_BYTES)]
    return b"".join(b"\0%b\0%b%b" % ((len(c).to_bytes(3, "little"),) * 2 + (c,)) for c in chunks)


def reconstruction(content: bytes, digest: str, asked: str | None, url: str) -> dict[str, Any] | None:
    """Where the chunks are that hold the bytes `asked` for, a Range header; None for what is beyond the end."""
    size, stride = len(content), CHUNK_BYTES + HEADER_BYTES
    wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", asked or f"bytes=0-{size - 1}")
    assert wanted is not None
    start, end = int(wanted[1]), min(int(wanted[2]) + 1, size)
    if start >= size:
        return None
    first, last = start // CHUNK_BYTES, -(-end // CHUNK_BYTES)
    chunks = {"start": first, "end": last}
    at = {"start": first * stride, "end": min(last * stride, len(xorb_of(content))) - 1}
    length = min(last * CHUNK_BYTES, size) - first * CHUNK_BYTES
    return {
        "offset_into_first_range": start - first * CHUNK_BYTES,
        "terms": [{"hash": digest, "unpacked_length": length, "range": chunks}],
        "fetch_info": {digest: [{"range": chunks, "url": url, "url_range": at}]},
    }


class XetStorage:
    """What the handler of the FakeHub answers for it."""

    def xet_token(self: Any, repo_id: str, revision: str) -> None:
        if self._repo(repo_id, revision, content=True) is None:
            return None
        expires = str(int(time.time()) + 3600)
        cas = self.hub.cdn.removesuffix("cdn") + "cas"
        headers = {"X-Xet-Cas-Url": cas, "X-Xet-Access-Token": TOKEN, "X-Xet-Token-Expiration": expires}
        return self._reply(200, b"{}", headers)

    def cas(self: Any, where: str) -> None:
        """Where the chunks of a file are, and the chunks."""
        what, _, digest = where.rpartition("/")
        file = next((f for r in self.hub.repos.values() for f in r.files.values() if f.sha256 == digest), None)
        if file is None or what not in ("v1/reconstructions", "xorb"):
            return self._reply(404, b"", {})
        if what == "xorb":
            return self._body(replace(file, content=xorb_of(file.content)), {"Accept-Ranges": "bytes"})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._reply(401, b"", {})
        url = f"{self.hub.url}/cas/xorb/{digest}"
        found = reconstruction(file.content, digest, self.headers.get("Range"), url)
        return self._reply(416, b"", {}) if found is None else self._json(found)
