"""Files of filesets: upload, download with ranges, list, delete."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from email.message import Message as Headers
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from nimhost.api.filesets import storage_token
from nimhost.api.http import JsonReply, body_chunks
from nimhost.api.parts import Parts
from nimhost.api.resource import get_entity
from nimhost.deployments.repos import repo_in
from nimhost.entities import Entity, LocalStorage
from nimhost.errors import BadRequest, NotFound
from nimhost.host.files import OpenFile, StoredFile, split_path
from nimhost.host.hub_files import ListedFile, RemoteFile
from nimhost.kinds import KINDS

Json = dict[str, Any]
_RANGE = re.compile(r"bytes=(\d*)-(\d*)")
_PART_HEAD_LIMIT_BYTES = 16 << 10


def routes(parts: Parts) -> list[Route]:
    files = Files(parts)
    one = f"{KINDS['filesets'].path('{workspace}')}/{{name}}"
    return [
        Route(f"{one}/files", files.list, methods=["GET"]),
        Route(f"{one}/-/{{path:path}}", files.download, methods=["GET"]),
        Route(f"{one}/-/{{path:path}}", files.upload, methods=["PUT"]),
        Route(f"{one}/-/{{path:path}}", files.delete, methods=["DELETE"]),
    ]


class FileReply(StreamingResponse):
    """Streams a part of an open file and closes it, whatever happens."""

    def __init__(
        self, file: OpenFile | RemoteFile, start: int, stop: int, status: int, headers: dict[str, str]
    ) -> None:
        super().__init__(file.read(start, stop), status, headers, media_type="application/octet-stream")
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["method"] == "HEAD":
                await Response(b"", self.status_code, dict(self.headers))(scope, receive, send)
            else:
                await super().__call__(scope, receive, send)
        finally:
            self._file.close()


class Files:
    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    async def list(self, request: Request) -> Response:
        fileset, prefix = await self._fileset(request), request.query_params.get("path", "").strip("/")
        storage, hub = fileset.wish.storage, self._parts.hub
        if (repo := repo_in(storage)) is not None and hub is not None:
            listed = await hub.list_files(repo, await storage_token(self._parts, storage, fileset.workspace))
            below = [f for f in listed if not prefix or f.path == prefix or f.path.startswith(f"{prefix}/")]
            return JsonReply({"data": [_shown(fileset, f, "cached" if f.cached else "not_cached") for f in below]})
        files = await self._parts.files.list_files(self._base(fileset), prefix)
        return JsonReply({"data": [_shown(fileset, file, "not_cacheable") for file in files]})

    async def download(self, request: Request) -> Response:
        fileset, path = await self._fileset(request), request.path_params["path"]
        try:
            file = await self._open(fileset, path)
        except NotFound as e:
            raise _no_file(fileset, path) from e
        size = file.file.size_bytes
        headers = {"accept-ranges": "bytes"}
        try:
            wanted = parse_range(request.headers.get("range"), size)
        except HTTPException:
            file.close()
            raise
        start, stop = wanted or (0, size)
        if isinstance(file, RemoteFile) and request.method == "GET":
            await file.begin(start, stop)
        if wanted is None:
            return FileReply(file, 0, size, 200, headers | {"content-length": str(size)})
        headers |= {"content-length": str(stop - start), "content-range": f"bytes {start}-{stop - 1}/{size}"}
        return FileReply(file, start, stop, 206, headers)

    async def upload(self, request: Request) -> Response:
        fileset, path = await self._fileset(request), request.path_params["path"]
        storage = fileset.wish.storage
        if not isinstance(storage, LocalStorage):
            raise BadRequest(f"Files cannot be uploaded into fileset '{fileset.ref}': its storage is {_type(storage)}.")
        if storage.path:
            raise _by_reference(fileset)
        chunks = body_chunks(request)
        content_type = request.headers.get("content-type", "")
        if content_type.lower().startswith("multipart/form-data"):
            chunks = first_part(chunks, content_type)
        file = await self._parts.files.write(self._base(fileset), path, chunks, self._while_there(fileset))
        if self._parts.specs is not None:
            self._parts.specs.touched([("filesets", fileset.workspace, fileset.name)])
        if self._parts.adapters is not None:
            self._parts.adapters.look_again()
        return JsonReply(_shown(fileset, file))

    @asynccontextmanager
    async def _while_there(self, fileset: Entity) -> AsyncIterator[None]:
        """It is there, and stays. Raises NotFound: it may have been deleted while a file came."""
        async with self._parts.store.transaction(keep=False) as tx:  # nobody writes meanwhile
            now = await tx.find("filesets", fileset.workspace, fileset.name)
            if now is None or now.id != fileset.id:
                raise KINDS["filesets"].not_found(fileset.workspace, fileset.name)
            yield

    async def delete(self, request: Request) -> Response:
        fileset, path = await self._fileset(request), request.path_params["path"]
        base = self._base(fileset, "deleted")
        if fileset.wish.storage.path:
            raise _by_reference(fileset)
        try:
            file = await self._parts.files.delete_file(base, path)
        except NotFound as e:
            raise _no_file(fileset, path) from e
        return JsonReply(_shown(fileset, file))

    async def _fileset(self, request: Request) -> Entity:
        where = request.path_params
        return await get_entity(self._parts.store, "filesets", where["workspace"], where["name"])

    async def _open(self, fileset: Entity, path: str) -> OpenFile | RemoteFile:
        """Raises NotFound, and BadRequest for a path that leads outside."""
        storage, hub = fileset.wish.storage, self._parts.hub
        if (repo := repo_in(storage)) is None or hub is None:
            return await self._parts.files.open_file(self._base(fileset), path)
        token = await storage_token(self._parts, storage, fileset.workspace)
        found = await hub.open_file(repo, token, "/".join(split_path(path)))
        return found if isinstance(found, RemoteFile) else await self._parts.files.open_path(found)

    def _base(self, fileset: Entity, done: str = "read") -> Path:
        """The directory of a local fileset. Raises BadRequest for one that is kept elsewhere."""
        storage = fileset.wish.storage
        if not isinstance(storage, LocalStorage):
            raise BadRequest(
                f"The files of fileset '{fileset.ref}' cannot be {done} here: its storage is {_type(storage)}.",
                hint="Create a fileset without storage to keep files here.",
            )
        return self._parts.files.base(fileset)


def _type(storage: Any) -> str:
    return str(storage.__struct_config__.tag)


def _by_reference(fileset: Entity) -> BadRequest:
    return BadRequest(
        f"Fileset '{fileset.ref}' is the directory {fileset.wish.storage.path}: nimhost does not write there.",
        hint="Change the files in that directory, or create a fileset without storage and upload into it.",
    )


def _no_file(fileset: Entity, path: str) -> NotFound:
    return NotFound(f"File '{path}' not found in fileset '{fileset.ref}'")


def _shown(fileset: Entity, file: StoredFile | ListedFile, cache_status: str | None = None) -> Json:
    url = f"{KINDS['filesets'].path(fileset.workspace)}/{fileset.name}/-/{file.path}"
    return {
        "file_ref": f"{fileset.ref}#{file.path}",
        "file_url": url,
        "path": file.path,
        "size": file.size_bytes,
        "cache_status": cache_status,
    }


def parse_range(header: str | None, size: int) -> tuple[int, int] | None:
    """`bytes=a-b` as (start, stop); None for the whole file. Several ranges at once get the whole file.

    Raises HTTPException 416 for one that is not inside the file: an end beyond it is refused, not cut.
    """
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or match.groups() == ("", ""):
        return None
    first, last = (int(text[:18]) if text else None for text in match.groups())
    if first is None:
        assert last is not None
        start, stop = max(0, size - last), size
    else:
        start, stop = first, size if last is None else last + 1
    if not start < stop <= size:
        raise HTTPException(
            416, f"The range '{header}' is not inside the file of {size} bytes.", {"content-range": f"bytes */{size}"}
        )
    return start, stop


async def first_part(chunks: AsyncIterator[bytes], content_type: str) -> AsyncIterator[bytes]:
    """The content of the first part of a multipart/form-data body. Raises BadRequest."""
    headers = Headers()
    headers["content-type"] = content_type
    boundary = str(headers.get_param("boundary") or "")
    if not boundary:
        raise BadRequest("The multipart body has no boundary in its content type.")
    opening, closing = f"--{boundary}\r\n".encode(), f"\r\n--{boundary}".encode()
    buffer, inside = b"", False
    async for chunk in chunks:
        buffer += chunk
        if not inside:
            head = buffer.find(b"\r\n\r\n")
            if head < 0 and len(buffer) < _PART_HEAD_LIMIT_BYTES:
                continue
            if head < 0 or not buffer.startswith(opening):
                raise BadRequest("The multipart body does not begin with a part.")
            buffer, inside = buffer[head + 4 :], True
        if (end := buffer.find(closing)) >= 0:
            yield buffer[:end]
            async for _ in chunks:  # other parts are not ours; the body is read to its end
                pass
            return
        if len(buffer) > len(closing):
            yield buffer[: -len(closing)]
            buffer = buffer[-len(closing) :]
    raise BadRequest("The multipart body ends in the middle of a part.")
