"""Files over the wire: upload raw and multipart, download whole and in ranges, list, delete; and no way out."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest
import uvicorn

import nimhost.api.http as http
from nimhost.api.app import control_plane, entry
from nimhost.config import Settings
from tests.api.conftest import FILESETS, World, gateway
from tests.support import eventually

FILES = f"{FILESETS}/ff"


@pytest.fixture
async def files(world: World) -> World:
    await world.make(FILESETS, name="ff")
    return world


async def test_a_file_goes_up_and_comes_down_whole(files: World) -> None:
    data = bytes(range(256)) * 20
    up = await files("PUT", f"{FILES}/-/data%2Fsub%2Fb.bin", content=data)
    assert (up.status_code, up.json()) == (
        200,
        {
            "file_ref": "default/ff#data/sub/b.bin",
            "file_url": f"{FILES}/-/data/sub/b.bin",
            "path": "data/sub/b.bin",
            "size": 5120,
            "cache_status": None,
        },
    )
    down = await files("GET", f"{FILES}/-/data/sub/b.bin")
    assert (down.status_code, down.content, down.headers["accept-ranges"]) == (200, data, "bytes")
    assert (down.headers["content-length"], down.headers["content-type"]) == ("5120", "application/octet-stream")
    head = await files("HEAD", f"{FILES}/-/data/sub/b.bin")
    assert (head.status_code, head.content, head.headers["content-length"]) == (200, b"", "5120")
    listed = (await files("GET", f"{FILES}/files")).json()["data"]
    assert [(f["path"], f["size"], f["cache_status"]) for f in listed] == [("data/sub/b.bin", 5120, "not_cacheable")]
    assert (await files("GET", f"{FILES}/files?path=other")).json() == {"data": []}
    gone = await files("DELETE", f"{FILES}/-/data/sub/b.bin")
    assert (gone.status_code, gone.json()["size"]) == (200, 5120)
    missing = await files("GET", f"{FILES}/-/data/sub/b.bin")
    assert (missing.status_code, missing.json()) == (
        404,
        {"detail": "File 'data/sub/b.bin' not found in fileset 'default/ff'"},
    )


@pytest.mark.parametrize(
    ("header", "status", "content", "content_range"),
    [
        ("bytes=0-3", 206, b"0123", "bytes 0-3/10"),
        ("bytes=4-", 206, b"456789", "bytes 4-9/10"),
        ("bytes=-3", 206, b"789", "bytes 7-9/10"),
        ("bytes=-30", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=9-9", 206, b"9", "bytes 9-9/10"),
        ("bytes=0-10", 416, None, "bytes */10"),
        ("bytes=10-", 416, None, "bytes */10"),
        ("bytes=5-4", 416, None, "bytes */10"),
        ("bytes=-0", 416, None, "bytes */10"),
        ("bytes=99999999999999999999999999-", 416, None, "bytes */10"),
        ("bytes=0-1,3-4", 200, b"0123456789", None),
        ("items=0-1", 200, b"0123456789", None),
        ("bytes=-", 200, b"0123456789", None),
    ],
)
async def test_ranges(files: World, header: str, status: int, content: bytes | None, content_range: str | None) -> None:
    await files("PUT", f"{FILES}/-/f", content=b"0123456789")
    reply = await files("GET", f"{FILES}/-/f", headers={"range": header})
    assert (reply.status_code, reply.headers.get("content-range")) == (status, content_range)
    assert content is None or reply.content == content
    assert reply.headers["content-length"] == str(len(reply.content))


async def test_an_empty_file_is_a_file(files: World) -> None:
    assert (await files("PUT", f"{FILES}/-/f", content=b"")).json()["size"] == 0
    assert (await files("GET", f"{FILES}/-/f")).content == b""


@pytest.mark.parametrize("size", [0, 1, 100, 70_000, 3_000_000])
async def test_a_multipart_upload_stores_the_first_part_byte_for_byte(files: World, size: int) -> None:
    data = (b"\r\n--not the boundary\r\n" * (size // 20 + 1))[:size]
    reply = await files("PUT", f"{FILES}/-/f", files={"file": ("x.bin", data), "other": ("y", b"zzz")})
    assert (reply.status_code, reply.json()["size"]) == (200, size), reply.text
    assert (await files("GET", f"{FILES}/-/f")).content == data


@pytest.mark.parametrize(
    ("content_type", "body"),
    [
        ("multipart/form-data", b"x"),
        ("multipart/form-data; boundary=b", b"no part"),
        ("multipart/form-data; boundary=b", b"--b\r\nContent-Disposition: form-data\r\n\r\nhalf"),
        ("multipart/form-data; boundary=b", b"--b\r\n" + b"x" * 30_000),
    ],
)
async def test_a_broken_multipart_body_is_400_and_stores_nothing(files: World, content_type: str, body: bytes) -> None:
    reply = await files("PUT", f"{FILES}/-/f", content=body, headers={"content-type": content_type})
    assert reply.status_code == 400, reply.text
    assert (await files("GET", f"{FILES}/files")).json() == {"data": []}


@pytest.mark.fault(37)
@pytest.mark.parametrize(
    "path", ["%2e%2e/x", "..%2Fx", "a/%2e%2e/%2e%2e/x", "%2Fetc%2Fpasswd", "%252e%252e%252fx", "a%00b", "a%5C..%5Cb"]
)
async def test_a_path_that_leads_out_of_the_fileset_is_400(files: World, path: str) -> None:
    outside = files.parts.files.root / "default" / "x"
    outside.write_text("canary") if outside.parent.exists() else None
    for method in ("GET", "PUT", "DELETE"):
        reply = await files(method, f"{FILES}/-/{path}", content=b"evil" if method == "PUT" else None)
        assert reply.status_code == 400, (method, reply.text)
        assert "canary" not in reply.text
    assert (await files("GET", f"{FILES}/files")).json() == {"data": []}


async def test_the_files_of_a_hub_fileset_are_not_here(world: World) -> None:
    await world.make(FILESETS, name="hub", storage={"type": "huggingface", "repo_id": "a/b"})
    for method, path in (("GET", "files"), ("GET", "-/x"), ("PUT", "-/x")):
        reply = await world(method, f"{FILESETS}/hub/{path}")
        assert (reply.status_code, "huggingface" in reply.json()["detail"]) == (400, True)


@pytest.mark.fault(40)
async def test_an_upload_that_stops_coming_is_408_and_one_that_breaks_off_leaves_nothing(
    files: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "QUIET_LIMIT_S", 0.1)
    app = entry(control_plane(files.parts), gateway, Settings())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    await eventually(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    start = f"PUT {FILES}/-/f HTTP/1.1\r\nHost: localhost:{port}\r\nContent-Length: 3000000\r\n\r\n".encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(start + b"x" * 2_000_000)
    assert await reader.readline() == b"HTTP/1.1 408 Request Timeout\r\n"
    writer.close()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(start + b"x" * 2_000_000)
    await writer.drain()
    writer.close()
    drafts = files.parts.files.root / ".incoming"
    await eventually(lambda: not list(drafts.iterdir()))
    assert (await files("GET", f"{FILES}/files")).json() == {"data": []}
    server.should_exit = True
    await serving


async def test_a_download_that_the_client_leaves_closes_the_file(files: World, tmp_path: Path) -> None:
    await files("PUT", f"{FILES}/-/f", content=b"x" * 5_000_000)
    app = entry(control_plane(files.parts), gateway, Settings())
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", lifespan="off"))
    serving = asyncio.create_task(server.serve())
    await eventually(lambda: server.started)
    port = server.servers[0].sockets[0].getsockname()[1]
    path = str(files.parts.files.directory("default", "ff") / "f")

    def is_open() -> bool:
        return any(str(fd.resolve()) == path for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink())

    async with (
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client,
        client.stream("GET", f"{FILES}/-/f") as reply,
    ):
        await anext(reply.aiter_raw(1000))
        assert is_open()
    await eventually(lambda: not is_open())
    server.should_exit = True
    await serving
