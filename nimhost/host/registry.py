"""What a registry says about an image before a byte of it is pulled: what it asks of the driver, its CPUs, its size.

By the API that Docker pulls with: an index names one manifest for each kind of machine, a manifest names its layers,
with their sizes, and its config, which has the environment (https://github.com/opencontainers/distribution-spec and
https://github.com/opencontainers/image-spec). A manifest that is read counts as a pull where pulls are counted
(https://docs.docker.com/docker-hub/usage/pulls/), so answers are kept: see `deployments.offers`.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import logging
import re
import ssl
from base64 import b64encode
from typing import NamedTuple, TypeVar

import httpx
import msgspec
from msgspec import Struct

from nimhost.host.docker_replies import environment

log = logging.getLogger(__name__)

Login = tuple[str, str]
"""User and password."""
T = TypeVar("T", bound=Struct)

ANSWER_S = 3.0
"""How long a registry may take to say what it has: longer, and the pull would be held up."""
MANIFEST_BYTES = 4 * 2**20
CONFIG_BYTES = 8 * 2**20
TOKEN_BYTES = 2**20
MOST_HOPS = 5
DOCKER_HUB = ("docker.io", "index.docker.io")
INDEXES = ("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json")
MANIFESTS = ("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json")
_ACCEPT = ", ".join((*INDEXES, *MANIFESTS))
_HOST = re.compile(r"[A-Za-z0-9.-]+(:\d+)?|\[[0-9a-fA-F:]+\](:\d+)?")
_NAME = re.compile(r"[a-z0-9]+([._/-]+[a-z0-9]+)*")
_TARGET = re.compile(r"\w[\w.-]{0,127}|sha256:[0-9a-f]{64}")
_WORD = re.compile(r'([\w-]+)(?:\s*=\s*(?:"([^"]*)"|([^\s,"]+)))?')
"""Of a challenge: its scheme, which has no value, or a parameter."""


class Reference(NamedTuple):
    """Where an image is: the host of its registry, its repository there, and a tag or digest."""

    host: str
    name: str
    target: str

    @property
    def is_local(self) -> bool:
        """On this machine: like Docker, without TLS (https://docs.docker.com/reference/cli/dockerd/, "Insecure
        registries")."""
        return _is_here(httpx.URL(f"http://{self.host}"))

    @property
    def url(self) -> str:
        return f"http{'' if self.is_local else 's'}://{self.host}/v2/{self.name}"


def parse_reference(image: str) -> Reference | None:
    """As Docker reads `[HOST[:PORT]/]NAME[:TAG][@DIGEST]`; None for what is no such thing."""
    path, _, digest = image.partition("@")
    host, slash, rest = path.partition("/")
    if not slash or not ("." in host or ":" in host or host == "localhost"):
        host, rest = DOCKER_HUB[0], path
    name, _, tag = rest.partition(":")
    if host in DOCKER_HUB:
        host, name = "registry-1.docker.io", name if "/" in name else f"library/{name}"
    found = Reference(host, name, digest or tag or "latest")
    rules = zip((_HOST, _NAME, _TARGET), found, strict=True)
    return found if all(rule.fullmatch(part) for rule, part in rules) else None


class Offer(Struct, frozen=True, kw_only=True):
    """An image as its registry has it."""

    env: dict[str, str] = {}
    architecture: str = ""
    """The CPUs it is made for, in Docker's words; all of them where that asked for is not among them."""
    download_bytes: int = 0
    """Of its layers, packed as they are sent; 0 where there is none for the machine."""


class _Platform(Struct, frozen=True):
    architecture: str = ""
    os: str = ""


class _Descriptor(Struct, frozen=True):
    digest: str
    size: int = 0
    platform: _Platform | None = None


class _Manifest(Struct, frozen=True):
    """An index has `manifests`, an image the rest; what is older or something else has neither."""

    manifests: list[_Descriptor] = []
    config: _Descriptor | None = None
    layers: list[_Descriptor] = []


class _Container(Struct, frozen=True, rename="pascal"):
    env: list[str] | None = None


class _Config(Struct, frozen=True):
    architecture: str
    os: str
    config: _Container = _Container()


class _Token(Struct, frozen=True):
    token: str = ""
    access_token: str = ""


class _Unknown(Exception):
    """The registry said nothing that could be used."""


_NO_ANSWER = (
    _Unknown, httpx.HTTPError, httpx.InvalidURL, msgspec.MsgspecError, OSError,
    RecursionError,  # of msgspec: a document that is nested without end
    ValueError, ImportError,  # of httpx: a proxy in the environment that it does not speak with, as SOCKS
)  # fmt: skip


class Registries:
    """`limit_s`: for everything that one answer takes."""

    def __init__(self, limit_s: float = ANSWER_S) -> None:
        self.limit_s = limit_s
        self._trust: ssl.SSLContext | None = None

    async def ask(self, image: str, architecture: str, login: Login | None = None) -> Offer | None:
        """What a machine with these CPUs (`amd64`, `arm64`) would pull under this name.

        None when that cannot be told, for whatever reason: the pull meets the same, and says it. Never raises. `login`
        is shown to the registry, and to the place that it names for tokens, by TLS; to nobody else.
        """
        where = parse_reference(image)
        if where is None:
            return None
        try:
            async with asyncio.timeout(self.limit_s), await self._client(where) as client:
                return await _Asking(client, where, login).offer(architecture)
        except _NO_ANSWER as error:
            log.debug("image %s: its registry does not say what it is: %s", image, type(error).__name__)
            return None

    async def _client(self, where: Reference) -> httpx.AsyncClient:
        """Through the proxy of the environment, but not to this machine."""
        if self._trust is None:  # reading the system's certificates takes tens of milliseconds
            self._trust = await asyncio.to_thread(ssl.create_default_context)
        return httpx.AsyncClient(
            verify=self._trust, trust_env=not where.is_local, timeout=self.limit_s,
            headers={"Accept-Encoding": "identity"},
        )  # fmt: skip


class _Asking:
    """One answer, with one authorization."""

    def __init__(self, client: httpx.AsyncClient, where: Reference, login: Login | None) -> None:
        self._client = client
        self._where = where
        self._login = login
        self._authorization: dict[str, str] = {}

    async def offer(self, architecture: str) -> Offer:
        manifest = await self._read(f"manifests/{self._where.target}", MANIFEST_BYTES, _Manifest)
        if manifest.manifests:
            choice = _chosen(manifest.manifests, architecture)
            if isinstance(choice, Offer):
                return choice
            manifest = await self._read(f"manifests/{choice.digest}", MANIFEST_BYTES, _Manifest)
        if manifest.config is None or not manifest.layers:
            raise _Unknown
        config = await self._read(f"blobs/{manifest.config.digest}", CONFIG_BYTES, _Config)
        if config.os != "linux":
            raise _Unknown
        return Offer(
            env=environment(config.config.env),
            architecture=config.architecture,
            download_bytes=sum(max(0, layer.size) for layer in manifest.layers),
        )

    async def _read(self, path: str, most_bytes: int, kind: type[T]) -> T:
        """What was asked for by its digest has that digest."""
        url, headers = f"{self._where.url}/{path}", {"Accept": _ACCEPT if path.startswith("manifests/") else "*/*"}
        status, challenges, body = await self._get(url, headers | self._authorization, most_bytes)
        if status == 401 and not self._authorization:
            self._authorization = {"Authorization": await self._answer(challenges)}
            status, _, body = await self._get(url, headers | self._authorization, most_bytes)
        digest = path.rpartition("/")[2]
        if status != 200 or (digest.startswith("sha256:") and digest[7:] != hashlib.sha256(body).hexdigest()):
            raise _Unknown
        return msgspec.json.decode(body, type=kind)

    async def _get(self, url: str, headers: dict[str, str], most_bytes: int) -> tuple[int, list[str], bytes]:
        """Status, challenges and body of a reply: a larger body than that is none."""
        request = self._client.build_request("GET", url, headers=headers)
        for _ in range(MOST_HOPS):
            reply = await self._client.send(request, stream=True)
            try:
                if reply.next_request is None:
                    return reply.status_code, reply.headers.get_list("www-authenticate"), await _body(reply, most_bytes)
                request = reply.next_request  # httpx takes the authorization out where it leads to another host
            finally:
                await reply.aclose()
        raise _Unknown

    async def _answer(self, challenges: list[str]) -> str:
        """The authorization that a registry wants (https://distribution.github.io/distribution/spec/auth/token/)."""
        known = read_challenges(challenges)
        if "bearer" in known:
            return f"Bearer {await self._token(known['bearer'])}"
        if "basic" in known and self._login is not None:
            return _basic(self._login)
        raise _Unknown

    async def _token(self, challenge: dict[str, str]) -> str:
        """To pull from this repository, whatever else the challenge asks for. nvcr.io names no service."""
        realm = httpx.URL(challenge.get("realm", ""))
        if not may_give_tokens(realm, self._where):
            raise _Unknown
        query = {"scope": f"repository:{self._where.name}:pull"}
        if service := challenge.get("service"):
            query["service"] = service
        headers = {"Authorization": _basic(self._login)} if self._login else {}
        status, _, body = await self._get(str(realm.copy_merge_params(query)), headers, TOKEN_BYTES)
        found = msgspec.json.decode(body, type=_Token) if status == 200 else _Token()
        if not (token := found.token or found.access_token):
            raise _Unknown
        return token


def read_challenges(lines: list[str]) -> dict[str, dict[str, str]]:
    """Scheme -> parameters, of the values of `WWW-Authenticate`: one line may hold several (RFC 9110, 11.6.1)."""
    found: dict[str, dict[str, str]] = {}
    parameters: dict[str, str] = {}
    for word in _WORD.finditer(", ".join(lines)):
        name, value = word[1].lower(), word[2] or word[3] or ""
        if word.lastindex == 1:
            parameters = found[name] = {}
        else:
            parameters[name] = value
    return found


def may_give_tokens(realm: httpx.URL, where: Reference) -> bool:
    """Whether a login may be shown there: by TLS, or without it from this machine to itself."""
    return realm.scheme == "https" or (realm.scheme == "http" and where.is_local and _is_here(realm))


def _is_here(url: httpx.URL) -> bool:
    try:
        return url.host == "localhost" or ipaddress.ip_address(url.host).is_loopback
    except ValueError:
        return False


async def _body(reply: httpx.Response, most_bytes: int) -> bytes:
    body = bytearray()
    async for chunk in reply.aiter_raw():
        body += chunk
        if len(body) > most_bytes:
            raise _Unknown
    return bytes(body)


def _chosen(manifests: list[_Descriptor], architecture: str) -> _Descriptor | Offer:
    """The one for such a machine; without one, an offer to all the others."""
    linux = {m.platform.architecture: m for m in reversed(manifests) if m.platform and m.platform.os == "linux"}
    if not linux:
        raise _Unknown
    return linux.get(architecture) or Offer(architecture=", ".join(sorted(linux)))


def _basic(login: Login) -> str:
    return f"Basic {b64encode(':'.join(login).encode()).decode()}"
