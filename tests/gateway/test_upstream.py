"""The connections to upstreams: what may come over them, when one is used again, and when a request is sent again."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from nimhost.config import Gateway as GatewaySettings
from nimhost.gateway import upstream
from nimhost.gateway.connection import MAX_HEAD_BYTES
from tests.fakes.engine import FakeEngine, Faults
from tests.gateway.conftest import Door, G, Reply, engine_upstream, open_door, unanswering
from tests.support import eventually

PROVIDER = f"{G}/default/provider/p/-"
CHAT_PATH = f"{PROVIDER}/v1/chat/completions"
WHOLE = b'{"model":"qwen-served"}'
OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"


class Wire:
    """A server that answers each request with the next of `answers` (the last one again and again): bytes, or None to
    close the connection. A reply that is followed by `CLOSE` is followed by the end of the connection.
    """

    CLOSE = b"\x00close"

    def __init__(self, *answers: bytes | None) -> None:
        self.answers = list(answers)
        self.heads: list[bytes] = []
        self.connections = 0
        self.open: set[asyncio.StreamWriter] = set()
        self.ssl: ssl.SSLContext | None = None

    async def __aenter__(self) -> Wire:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.ssl)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in list(self.open):
            writer.close()
        await eventually(lambda: not self.open)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open.add(writer)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = next(
                    (int(li[15:]) for li in head.lower().split(b"\r\n") if li.startswith(b"content-length:")), 0
                )
                await reader.readexactly(length)
                self.heads.append(head)
                answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                if answer is None:
                    return
                writer.write(answer.removesuffix(self.CLOSE))
                if answer.endswith(self.CLOSE):
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            return
        finally:
            self.open.discard(writer)
            writer.close()


@asynccontextmanager
async def wired(door: Door, *answers: bytes | None) -> AsyncIterator[Wire]:
    async with Wire(*answers) as wire:
        door.route(engine_upstream(FakeEngine(port=wire.port), policy="generic"))
        yield wire


async def get(door: Door, method: str = "GET") -> Reply:
    return await door.ask(method, f"{PROVIDER}/v1/models")


# --- what may come


@pytest.mark.parametrize(
    ("answer", "body"),
    [
        (OK, b"ok"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\no\r\n1;x=y\r\nk\r\n0\r\n\r\n", b"ok"),
        (b"HTTP/1.1 200 OK\r\n\r\nok" + Wire.CLOSE, b"ok"),
        (b"HTTP/1.0 200 OK\r\n\r\nok" + Wire.CLOSE, b"ok"),
        (b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok" + Wire.CLOSE, b"ok"),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK, b"ok"),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b""),
    ],
    ids=["length", "chunks", "until-the-end", "http-1.0", "length-and-close", "informational", "no-content"],
)
async def test_every_framing_is_read_to_its_end(door: Door, answer: bytes, body: bytes) -> None:
    async with wired(door, answer):
        for _ in range(2):
            reply = await get(door)
            assert (reply.body if body else reply.rest) == body
            assert reply.status in (200, 204)
            assert "link" not in reply.headers
            assert reply.status == 204 or reply.whole


async def test_reply_in_single_bytes_is_whole(door: Door) -> None:
    async def drip(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        for byte in b"HTTP/1.1 200 OK\r\nx-a: b\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n":
            writer.write(bytes([byte]))
            await asyncio.sleep(0)
        writer.close()

    server = await asyncio.start_server(drip, "127.0.0.1", 0)
    async with server:
        door.route(engine_upstream(FakeEngine(port=server.sockets[0].getsockname()[1])))
        reply = await get(door)
    assert (reply.body, reply.headers["x-a"], reply.whole) == (b"ok", "b", True)


async def test_trailer_is_no_header(door: Door) -> None:
    async with wired(door, b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n1\r\no\r\n0\r\nx-t: 1\r\n\r\n"):
        reply = await get(door)
    assert reply.body == b"o"
    assert "x-t" not in reply.headers


@pytest.mark.parametrize("lines", [["X-Hop"], ["keep-alive, x-hop"], ["keep-alive", "X-HOP"], ["X-Hop", "X-B,close"]])
async def test_headers_that_connection_names_are_not_the_clients(door: Door, lines: list[str]) -> None:
    named = "".join(f"Connection: {line}\r\n" for line in lines).encode()
    async with wired(door, b"HTTP/1.1 200 OK\r\nX-A: 1\r\nx-hop: 1\r\n%bcontent-length: 2\r\n\r\nok" % named):
        reply = await get(door)
    assert (reply.body, reply.headers["x-a"], reply.headers["connection"]) == (b"ok", "1", "close")
    assert "x-hop" not in reply.headers


@pytest.mark.fault(27)
async def test_headers_without_an_end_are_not_waited_for(door: Door) -> None:
    async with wired(door, b"HTTP/1.1 200 OK\r\nx: " + b"y" * (2 * MAX_HEAD_BYTES)):
        reply = await asyncio.wait_for(get(door), 2)
    assert (reply.status, "too large headers" in reply.json()["detail"]) == (502, True)


async def test_head_has_no_body_whatever_its_headers_say(door: Door) -> None:
    async with wired(door, b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n", OK):
        reply = await get(door, "HEAD")
        assert (reply.status, reply.headers["content-length"], reply.rest) == (200, "5", b"")
        assert (await get(door)).body == b"ok"


@pytest.mark.fault(27)
@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x: y\r\n" * 300 + b"\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\nok",
        b"HTTP/1.1 200 OK\r\nx: a\nb: c\r\n",
    ],
    ids=["upgrade", "many-headers", "two-framings", "two-lengths", "bare-line-feed"],
)
async def test_reply_that_nobody_should_trust_is_502(door: Door, answer: bytes) -> None:
    async with wired(door, answer + Wire.CLOSE):
        reply = await get(door)
    assert (reply.status, reply.headers["x-nimhost-error"]) == (502, "UpstreamError")


async def test_bytes_that_nobody_asked_for_reach_nobody(door: Door) -> None:
    async with wired(door, OK + b"HTTP/1.1 200 OK\r\ncontent-length: 6\r\n\r\nforged", OK) as wire:
        assert [(await get(door)).body for _ in range(3)] == [b"ok"] * 3
        assert wire.connections == 2


async def test_host_and_path_are_the_providers(door: Door) -> None:
    async with Wire(OK) as wire:
        door.route(
            engine_upstream(
                FakeEngine(port=wire.port), base_url=f"http://LOCALHOST:{wire.port}/a%20b/v1", policy="external"
            )
        )
        await door.ask("GET", f"{PROVIDER}/v1/models?x=%E4&y=a|b")
    assert wire.heads[0].startswith(b"GET /a%20b/v1/models?x=%E4&y=a|b HTTP/1.1\r\nhost: localhost:")


# --- when a connection is used again


async def test_connection_is_used_again_and_closed_when_idle(
    door: Door, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "IDLE_CONNECTION_S", 0.15)
    door.route(engine_upstream(engine))
    for _ in range(3):
        assert (await door.chat(WHOLE)).status == 200
    assert engine.connections_made == 1
    await eventually(lambda: not engine.connections)
    assert (await door.chat(WHOLE)).status == 200
    assert engine.connections_made == 2


async def test_connections_of_a_burst_are_closed_again(
    door: Door, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "IDLE_CONNECTION_S", 0.15)
    door.route(engine_upstream(engine))
    engine.faults = Faults(first_byte_delay_s=0.05)
    await asyncio.gather(*(door.chat(WHOLE) for _ in range(50)))
    assert engine.connections_made > 10
    await eventually(lambda: not engine.connections)
    assert not door.gateway._pool._connections


async def test_engine_that_starts_anew_is_reached_at_once(door: Door, engine: FakeEngine) -> None:
    door.route(engine_upstream(engine))
    assert (await door.chat(WHOLE)).status == 200
    await engine.stop()
    await engine.start()
    assert (await door.chat(WHOLE)).status == 200


# --- when a request is sent again


async def test_request_into_a_connection_that_was_closed_meanwhile_is_sent_again(door: Door) -> None:
    async with wired(door, OK, None, OK) as wire:
        assert (await door.chat(WHOLE)).body == b"ok"
        assert (await door.chat(WHOLE)).body == b"ok"
        assert wire.connections == 2


@pytest.mark.fault(27)
async def test_it_is_sent_again_only_once(door: Door) -> None:
    async with wired(door, OK, None) as wire:
        assert (await door.chat(WHOLE)).body == b"ok"
        assert (await door.chat(WHOLE)).status == 502
        assert len(wire.heads) == 3


@pytest.mark.fault(27)
async def test_request_that_broke_after_a_byte_of_its_reply_is_not_sent_again(door: Door) -> None:
    async with wired(door, OK, b"H" + Wire.CLOSE) as wire:
        assert (await door.chat(WHOLE)).body == b"ok"
        assert (await door.chat(WHOLE)).status == 502
        assert len(wire.heads) == 2


@pytest.mark.fault(27)
async def test_request_that_an_engine_had_time_to_work_on_is_not_sent_again(
    door: Door, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upstream, "STALE_WITHIN_S", 0.05)
    door.route(engine_upstream(engine))
    assert (await door.chat(WHOLE)).status == 200
    engine.faults = Faults(first_byte_delay_s=0.1, close_before_reply=True)
    assert (await door.chat(WHOLE)).status == 502
    assert len(engine.requests) == 2


@pytest.mark.fault(27)
async def test_upload_is_never_sent_again(door: Door) -> None:
    async with wired(door, OK, None) as wire:
        assert (await get(door)).body == b"ok"
        body = b"x" * 300_000
        reply = await door.ask("POST", f"{PROVIDER}/v1/infer", body, ["Content-Type: application/octet-stream"])
        assert reply.status == 502
        assert len(wire.heads) == 2


async def test_answer_before_the_upload_is_complete_reaches_the_client(door: Door) -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
        while await reader.read(65_536):
            pass
        writer.close()

    server = await asyncio.start_server(refuse, "127.0.0.1", 0)
    async with server:
        door.route(engine_upstream(FakeEngine(port=server.sockets[0].getsockname()[1]), policy="generic"))
        headers = ["Content-Length: 30000000", "Connection: keep-alive"]
        reader, writer = await door.open("POST", f"{PROVIDER}/v1/infer", b"x" * 100_000, headers)
        assert (await asyncio.wait_for(reader.readline(), 2)).startswith(b"HTTP/1.1 413 ")
        writer.close()


# --- where it is


async def test_name_that_does_not_resolve_is_502_and_says_so(door: Door) -> None:
    door.route(engine_upstream(FakeEngine(), base_url="http://nowhere.invalid:80", policy="external"))
    reply = await door.chat(WHOLE)
    assert (reply.status, reply.headers["x-nimhost-error"]) == (502, "UpstreamError")
    assert "cannot be reached" in reply.json()["detail"]
    assert "http://nowhere.invalid" in reply.json()["hint"]


async def test_second_address_of_a_name_is_tried(
    door: Door, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def two(host: str) -> list[str]:
        return ["127.0.0.9", "127.0.0.1"]

    monkeypatch.setattr(upstream, "_addresses_of", two)
    door.route(engine_upstream(engine, base_url=f"http://two.test:{engine.port}"))
    assert (await door.chat(WHOLE)).status == 200
    assert engine.requests[-1].header("host") == f"two.test:{engine.port}"


@pytest.mark.fault(28)
async def test_address_that_never_answers_is_passed_over_and_not_tried_first_again(
    engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an IPv6 address does where a network promises more than it has."""

    async def two(host: str) -> list[str]:
        return ["127.0.0.9", "127.0.0.1"]

    monkeypatch.setattr(upstream, "_addresses_of", two)
    monkeypatch.setattr(upstream, "ADDRESS_TTL_S", 0.0)
    monkeypatch.setattr(upstream, "IDLE_CONNECTION_S", 0.0)
    async with open_door(GatewaySettings(connect_timeout_s=0.6)) as door:
        door.route(engine_upstream(engine, base_url=f"http://two.test:{engine.port}"))
        with unanswering("127.0.0.9", engine.port):
            assert (await door.chat(WHOLE)).headers["x-fake-instance"] == "a"
        async with FakeEngine(served=engine.served, tag="b", host="127.0.0.9", port=engine.port):
            assert (await door.chat(WHOLE)).headers["x-fake-instance"] == "a"
    assert engine.connections_made == 2


# --- TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Key and certificate for localhost, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.2"))])
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1)).add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    path = tmp_path_factory.mktemp("tls") / "localhost.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return path


@pytest.fixture
async def secure(certificate: Path) -> AsyncIterator[Wire]:
    wire = Wire(OK)
    wire.ssl = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    wire.ssl.load_cert_chain(certificate)
    async with wire:
        yield wire


async def test_https_provider_is_verified_and_answers(
    door: Door, secure: Wire, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    door.route(engine_upstream(FakeEngine(), base_url=f"https://localhost:{secure.port}", policy="external"))
    body = b'{"x":"%s"}' % (b"y" * 500_000)
    for _ in range(3):
        assert (await door.chat(body)).body == b"ok"
    assert secure.connections == 1
    assert b"host: localhost:%d\r\n" % secure.port in secure.heads[0]


@pytest.mark.parametrize("trusted", [True, False])
async def test_certificate_of_somebody_else_is_502_and_nothing_is_sent(
    door: Door, secure: Wire, certificate: Path, monkeypatch: pytest.MonkeyPatch, trusted: bool
) -> None:
    if trusted:  # but it is not made out to this address
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    door.route(engine_upstream(FakeEngine(), base_url=f"https://127.0.0.1:{secure.port}", policy="external"))
    reply = await door.chat(WHOLE)
    assert (reply.status, reply.headers["x-nimhost-error"]) == (502, "UpstreamError")
    assert "certificate" in reply.json()["detail"]
    assert not secure.heads
