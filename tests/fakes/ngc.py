"""FakeNgc: a stand-in for NVIDIA's NGC, as far as models and resources go, with the faults of the FakeHub.

In a test: `with FakeNgc() as ngc: ngc.publish("org/team/name", "1.0", {"config.json": b"{}"})`; its `url` goes into
`storage.host`. As the real one does, it shows files page by page with their SHA-256, and sends their content from
another host, which refuses requests that show it the key.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from tests.fakes.hub import FakeFile, FakeHub, FakeRepo, Handler

KEY = "nvapi-of-the-tests"


@dataclass
class Artifact:
    kind: str
    """`models` or `resources`."""
    versions: list[str] = field(default_factory=list)
    readers: tuple[str, ...] = ()
    """Keys that may read it; none: every valid one."""
    licence: bool = False
    """It has one that nobody has accepted."""
    hashes: bool = True


class FakeNgc(FakeHub):
    def __init__(self, port: int = 0, page_size: int = 2) -> None:
        self.artifacts: dict[str, Artifact] = {}
        super().__init__(port, page_size)
        self.tokens = {KEY}

    def handler(self) -> type[Handler]:
        return _Handler

    def publish(
        self, name: str, version: str, files: dict[str, bytes], *, kind: str = "models", **rest: Any
    ) -> Artifact:
        """Publish a version of `org/team/name` (team `no-team`: none)."""
        artifact = self.artifacts.setdefault(name, Artifact(kind, **rest))
        artifact.versions.append(version)
        where = f"{name}/{version}"
        self.repos[where] = FakeRepo(where, {p: FakeFile(p, c, True) for p, c in files.items()}, version)
        return artifact


class _Handler(Handler):
    def answer(self, path: str, query: dict[str, list[str]]) -> None:
        match = re.fullmatch(r"/v2/org/([^/]+)(?:/team/([^/]+))?/(models|resources)/([^/]+)(/versions/.+)?", path)
        if match is None:
            return self._refusal(404, "NOT_FOUND", f"no route {path}")
        org, team, kind, target, rest = match.groups()
        name = f"{org}/{team or 'no-team'}/{target}"
        artifact = self._artifact(name, kind)
        if artifact is None:
            return None
        if rest is None:
            word = "model" if kind == "models" else "recipe"
            return self._json({word: {"name": target, "latestVersionIdStr": artifact.versions[-1]}})
        version, _, file = rest.removeprefix("/versions/").partition("/files")
        if version not in artifact.versions:
            return self._refusal(404, "NOT_FOUND", f"{target}:{version} could not be found")
        if artifact.licence:
            return self._refusal(412, "PRECONDITION_FAILED", "license terms need to be accepted")
        repo = self.hub.repos[f"{name}/{version}"]
        if file:
            return self._redirect(repo, file.removeprefix("/"))
        return self._list(artifact, repo, int(query.get("page-number", ["0"])[0]))

    def _artifact(self, name: str, kind: str) -> Artifact | None:
        assert isinstance(self.hub, FakeNgc)
        key = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        found = self.hub.artifacts.get(name)
        if key not in self.hub.tokens:
            self._refusal(401, "UNAUTHORIZED", "Invalid API key" if key else "")
        elif found is None or found.kind != kind:
            self._refusal(404, "NOT_FOUND", f"{name} could not be found")
        elif found.readers and key not in found.readers:
            self._refusal(403, "FORBIDDEN", "User is not authorized to access this resource")
        else:
            return found
        return None

    def _list(self, artifact: Artifact, repo: FakeRepo, page: int) -> None:
        size = self.hub.page_size
        files = list(repo.files.values())
        word = "modelFiles" if artifact.kind == "models" else "recipeFiles"
        entries = [_entry(file, artifact.hashes) for file in files[page * size : (page + 1) * size]]
        pages = {"index": page, "totalPages": -(-len(files) // size), "totalResults": len(files)}
        self._json({word: entries, "paginationInfo": pages, "requestStatus": {"statusCode": "SUCCESS"}})

    def _redirect(self, repo: FakeRepo, path: str) -> None:
        if path not in repo.files:
            return self._refusal(404, "NOT_FOUND", f"{path} could not be found")
        return self._reply(302, b"", {"Location": f"{self.hub.cdn}/{repo.repo_id}/{path}?ssec-algo=AES256"})

    def _refusal(self, status: int, code: str, text: str) -> None:
        body = {"requestStatus": {"statusCode": code, "statusDescription": text}}
        self._reply(status, json.dumps(body).encode(), {"Content-Type": "application/json"})


def _entry(file: FakeFile, hashed: bool) -> dict[str, Any]:
    entry: dict[str, Any] = {"path": file.path, "sizeInBytes": len(file.content)}
    if hashed:
        entry["sha256_base64"] = base64.b64encode(hashlib.sha256(file.content).digest()).decode()
    return entry
