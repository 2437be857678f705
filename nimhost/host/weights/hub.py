"""Requests to a model hub: metadata, ranges of files, and what its refusals mean.

Only the download process uses this: it blocks. Plain `urllib`, because a transfer that is to be resumed, bounded in
silence and counted needs the socket anyway, and one way of asking gives one way of failing.
"""

from __future__ import annotations

import http.client
import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from email.message import Message
from email.utils import parsedate_to_datetime
from typing import IO, Annotated, Any
from urllib.parse import quote, urlsplit

import msgspec
from msgspec import Meta, Struct

from nimhost import __version__
from nimhost.errors import HostError, HubUnavailable, NimhostError, WeightsGated, WeightsMissing
from nimhost.host.weights.choice import HubFile
from nimhost.host.weights.wire import Limits, Repo

NETWORK = (OSError, http.client.HTTPException)
BUSY = (408, 429, 500, 502, 503, 504)
_MAX_PAUSE_S = 30.0
MOST_WAIT_S = 86_400.0
"""Whatever a hub asks for: the time at which to come again has to be one that can be written down."""
LISTING_BYTES = 64 << 20
"""Of one reply about a repository: a page of names."""
MOST_FILES = 500_000
_PATIENT_S = 120.0
"""So long one such reply may take: a byte now and then would keep a connection for ever."""
_TEXT = 500
"""What a hub says goes into messages, no matter how much it is."""
_COMMIT = re.compile("[0-9a-f]{40}")

Say = Callable[[str], None]


class Interrupted(Exception):
    """A request failed in a way that may pass. `retry_after_s`: what the hub asked for."""

    def __init__(self, why: str, retry_after_s: float | None = None) -> None:
        super().__init__(why)
        self.retry_after_s = retry_after_s


class Patience:
    """Failures in a row of one connection: says what it waits for, waits, and at some point gives up."""

    def __init__(self, hub: Hub, say: Say) -> None:
        self._hub = hub
        self._say = say
        self._failures = 0

    def progressed(self) -> None:
        self._failures = 0

    def wait(self, failure: Interrupted) -> None:
        """Pause before the next try. Raises HubUnavailable when there is none."""
        limits, self._failures = self._hub.limits, self._failures + 1
        asked = failure.retry_after_s
        if self._failures >= limits.tries or (asked or 0) > limits.patience_s:
            raise HubUnavailable(
                f"{self._hub.endpoint}: {failure}, {self._failures} times in a row",
                "Try again later: what came is kept. For another hub or a mirror: [weights] endpoint in nimhost.toml.",
                asked,
            )
        pause_s = min(limits.backoff_s * 2 ** (self._failures - 1), _MAX_PAUSE_S) if asked is None else asked
        self._say(f"{failure}, retrying in {round(pause_s, 1):g} s ({self._failures}/{limits.tries - 1})")
        if asked is None:
            time.sleep(pause_s)
        else:
            self._hub.hold(pause_s)


class Hub:
    """One hub, for one repository: knows the token, and to whom it may be shown."""

    def __init__(self, endpoint: str, token: str | None, limits: Limits, repo: Repo) -> None:
        self.endpoint = endpoint.rstrip("/")
        self.limits = limits
        self.repo = repo
        self._token = token
        self._opener = urllib.request.build_opener(_Redirects(self._authorize))
        self._held_until = 0.0
        self._lock = threading.Lock()
        self.slots = threading.Semaphore(limits.parallel)
        """Whoever fetches bytes holds one."""

    def hold(self, pause_s: float) -> None:
        """No request, on any connection, for this long: the hub said so to one, it means all."""
        with self._lock:
            self._held_until = max(self._held_until, time.monotonic() + pause_s)

    def open(self, url: str, start: int = 0, stop: int | None = None) -> http.client.HTTPResponse:
        """The response to a GET of `url` from byte `start` on, up to (not including) `stop`.

        Raises Interrupted for what may pass, WeightsGated, WeightsMissing or HostError for what will not.
        """
        if urlsplit(url).scheme not in ("http", "https"):
            raise WeightsMissing(f"'{url}' is not an address of a model hub", "Write it as https://HOST.")
        time.sleep(max(0.0, self._held_until - time.monotonic()))
        request = urllib.request.Request(
            url, headers={"User-Agent": f"nimhost/{__version__}", "Accept-Encoding": "identity"}
        )
        if start or stop is not None:
            request.add_header("Range", f"bytes={start}-{'' if stop is None else stop - 1}")
        self._authorize(request)
        try:
            response: http.client.HTTPResponse = self._opener.open(request, timeout=self.limits.stall_s)
            return response
        except urllib.error.HTTPError as error:
            with error:
                raise self._meaning(error) from None
        except NETWORK as error:
            raise Interrupted(reason(error, self.limits.stall_s)) from error

    def chunk(self, response: http.client.HTTPResponse, most_bytes: int) -> bytes:
        """What comes next, never nothing. Raises Interrupted."""
        try:
            found = response.read1(most_bytes)
        except NETWORK as error:
            raise Interrupted(reason(error, self.limits.stall_s)) from error
        if not found:
            raise Interrupted("connection closed early")
        return found

    def sends_part(self, response: http.client.HTTPResponse, start: int, size_bytes: int) -> bool:
        """Whether a response is the file from byte `start` on; if not it is all of the file, by who knows no ranges.

        Closes what is neither, as a page of a proxy, and raises Interrupted: what came before is worth no less by that.
        """
        part = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range") or "")
        if response.status == 206 and part and int(part[1]) == start and part[2] in ("*", str(size_bytes)):
            return True
        if response.status != 206 and response.length in (None, size_bytes):
            return False
        response.close()
        raise Interrupted(f"{urlsplit(response.url).hostname} sends something else than the file")

    def json(self, url: str, say: Say) -> tuple[Any, Message]:
        """The decoded body and the headers; patient, so raises what `open` raises, or HubUnavailable."""
        patience = Patience(self, say)
        while True:
            try:
                with self.open(url) as response:
                    return json.loads(_body(response)), response.headers
            except Interrupted as failure:
                patience.wait(failure)
            except NETWORK as error:
                patience.wait(Interrupted(reason(error, self.limits.stall_s)))
            except (ValueError, RecursionError) as error:
                raise HubUnavailable(f"{self.endpoint} does not answer like a model hub: {error}") from error

    def commit(self, say: Say) -> str:
        """What the repository's revision stands for now."""
        if _COMMIT.fullmatch(self.repo.revision):
            return self.repo.revision
        body, _ = self.json(f"{self._api()}/revision/{quote(self.repo.revision, safe='')}", say)
        if not isinstance(body, dict) or not _COMMIT.fullmatch(str(body.get("sha"))):
            raise HubUnavailable(f"{self.endpoint} does not answer like a model hub: no commit for {self.repo}")
        return str(body["sha"])

    def tree(self, commit: str, say: Say) -> list[HubFile]:
        """Every file of the repository at `commit`."""
        files: list[HubFile] = []
        url = f"{self._api()}/tree/{commit}?recursive=true"
        while url:
            entries, headers = self.json(url, say)
            try:
                files += [_hub_file(entry) for entry in entries if entry["type"] == "file"]
            except (KeyError, TypeError, ValueError) as error:
                raise HubUnavailable(f"{self.endpoint} does not answer like a model hub: {error!r}"[:_TEXT]) from error
            following = re.search(r'<([^>]+)>\s*;\s*rel="?next', headers.get("Link") or "")
            url = following.group(1) if following else ""
            self.check_end(len(files), bool(entries) or not url)
        return files

    def check_end(self, listed: int, moved: bool) -> None:
        """After each page of a listing, which may not go on for ever. `moved`: the page brought something."""
        if listed > MOST_FILES or not moved:
            raise HostError(
                f"the list of the files of {self.repo} at {self.endpoint} does not end ({listed} of them so far)",
                f"Is {self.endpoint} a model hub? See [weights] endpoint, or the endpoint in the fileset.",
            )

    def file_url(self, commit: str, path: str) -> str:
        return f"{self.endpoint}/{_folder(self.repo)}{self.repo.repo_id}/resolve/{commit}/{quote(path)}"

    def _api(self) -> str:
        return f"{self.endpoint}/api/{self.repo.repo_type}s/{self.repo.repo_id}"

    def _authorize(self, request: urllib.request.Request) -> None:
        """Show the token to the hub itself only, never to the hosts it redirects to."""
        if self._token and _origin(request.full_url) == _origin(self.endpoint):
            request.add_unredirected_header("Authorization", f"Bearer {self._token}")

    def _meaning(self, error: urllib.error.HTTPError) -> NimhostError | Interrupted:
        host = urlsplit(error.url).hostname
        if error.code in BUSY:
            return Interrupted(f"{host} answers {error.code}", retry_after(error.headers))
        if _origin(error.url) != _origin(self.endpoint):
            return Interrupted(f"{host} answers {error.code}")  # a signed address ran out: the hub gives a new one
        return self._refused(error)

    def _refused(self, error: urllib.error.HTTPError) -> NimhostError:
        code, text = error.headers.get("X-Error-Code") or "", (error.headers.get("X-Error-Message") or "")[:_TEXT]
        return refusal(error.code, code, text, self.repo, self.endpoint, bool(self._token))


def refusal(status: int, code: str, text: str, repo: Repo, endpoint: str, has_token: bool) -> NimhostError:
    """What a hub's refusal means. `code` and `text` are its X-Error-Code and X-Error-Message.

    1 gated · 2 the token is not valid · 3 no such revision · 4 no such file · 5 no such repository, or a private one
    (the hub does not tell which) · 6 any other refusal of access · 7 the rest.
    """
    page = f"{endpoint.rstrip('/')}/{_folder(repo)}{repo.repo_id}"
    if code == "GatedRepo":  # 1
        what = "the token has no access to it" if has_token else "it needs a token"
        return WeightsGated(f"{repo.repo_id} is gated: {what}", f"Accept its licence at {page}, then {_ALLOW}")
    if status == 401 and "Invalid credentials" in text:  # 2
        return WeightsGated(f"{endpoint} refuses the token for {repo.repo_id}", f"Replace it: {_ALLOW}")
    if code == "RevisionNotFound":  # 3
        return WeightsMissing(f"{repo.repo_id} has no revision '{repo.revision}'", f"See {page}/tree/main")
    if code == "EntryNotFound":  # 4
        return WeightsMissing(f"a file of {repo} is gone from the hub", f"See {page}/tree/main")
    if code == "RepoNotFound" or status in (401, 404, 410):  # 5
        return WeightsMissing(
            f"there is no repository {repo.repo_id} at {endpoint}, or it is private",
            f"Check the name at {page}. If it is private: {_ALLOW}",
        )
    if status == 403:  # 6
        return WeightsGated(f"{endpoint} refuses {repo.repo_id}: {text or 'forbidden'}", f"See {page}; {_ALLOW}")
    return HostError(f"{endpoint} answers {status} for {repo.repo_id}: {text or code or 'no reason given'}")  # 7


def _folder(repo: Repo) -> str:
    return "" if repo.repo_type == "model" else f"{repo.repo_type}s/"


_ALLOW = (
    "nimhost secrets create hf-token --from-file -  (paste a token that may read it), "
    "and name it in the fileset: token_secret = hf-token"
)


def retry_after(headers: Message) -> float | None:
    """Seconds that the hub asks to wait, no more than MOST_WAIT_S: `Retry-After`, which may be a date by its own clock
    (RFC 9110, 10.2.3), or the reset time of an exhausted `RateLimit` (`r=0;t=55`)."""
    text = headers.get("Retry-After") or ""
    limited = re.search(r"r=0;\s*t=(\d+)", headers.get("RateLimit") or "")
    if re.fullmatch(r"\d+(\.\d+)?", text):
        asked = float(text)
    elif limited:
        asked = float(limited[1])
    else:
        try:
            there = parsedate_to_datetime(headers.get("Date") or "")
            asked = (parsedate_to_datetime(text) - there).total_seconds()
        except (ValueError, TypeError):  # no dates, or one without a zone
            return None
    return min(max(0.0, asked), MOST_WAIT_S)


def reason(error: BaseException, stall_s: float) -> str:
    inner = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(inner, TimeoutError):
        return f"no data for {stall_s:g} s"
    if isinstance(inner, OSError) and inner.strerror:
        return inner.strerror.lower()
    return str(inner)[:_TEXT] or type(inner).__name__


def _body(response: http.client.HTTPResponse) -> bytes:
    """Raises ValueError for one without an end, TimeoutError for one that comes too slowly."""
    until, pieces, size = time.monotonic() + _PATIENT_S, [], 0
    while chunk := response.read1(1 << 16):
        pieces.append(chunk)
        size += len(chunk)
        if size > LISTING_BYTES:
            raise ValueError(f"more than {LISTING_BYTES >> 20} MiB of it")
        if time.monotonic() > until:
            raise TimeoutError
    if response.length:
        raise http.client.IncompleteRead(b"", response.length)
    return b"".join(pieces)


class _Blob(Struct):
    oid: Annotated[str, Meta(pattern="^([0-9a-f]{40}|[0-9a-f]{64})$")]
    size: Annotated[int, Meta(ge=0)]


class _Entry(_Blob, rename={"xet": "xetHash"}):
    path: str
    lfs: _Blob | None = None
    xet: str | None = None


def _hub_file(entry: object) -> HubFile:
    """Raises ValueError for what tells of no file."""
    found = msgspec.convert(entry, _Entry)
    blob = found.lfs or found
    return HubFile(found.path, blob.size, blob.oid, bool(found.xet))


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


class _Redirects(urllib.request.HTTPRedirectHandler):
    def __init__(self, authorize: Callable[[urllib.request.Request], None]) -> None:
        self._authorize = authorize

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        if request is not None:
            self._authorize(request)
        return request
