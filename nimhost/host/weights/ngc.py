"""Requests to NVIDIA's NGC: the files of a model or resource version, listed, fetched in ranges, and its refusals.

The API is that of the NGC CLI and SDK (docs.ngc.nvidia.com): below `/v2/org/ORG[/team/TEAM]/{models|resources}/NAME`
lie the artifact with its latest version, `versions/V/files` with path, size and SHA-256 of each file, page by page,
and `versions/V/files/PATH`, which redirects to a signed address on another host. The API key goes along as a bearer
token, as keys that begin with `nvapi-` may, and to NGC itself only.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import urllib.error
from typing import Any
from urllib.parse import quote

from nimhost.errors import HostError, HubUnavailable, NimhostError, WeightsGated, WeightsMissing
from nimhost.host.weights.cache import is_version
from nimhost.host.weights.choice import HubFile
from nimhost.host.weights.hub import Hub, Say
from nimhost.host.weights.wire import LATEST, Limits, Repo

ENDPOINT = "https://api.ngc.nvidia.com"
PAGE_FILES = 1000
WORDS = {"model": ("models", "model", "modelFiles"), "resource": ("resources", "recipe", "recipeFiles")}
"""Kind of artifact -> its word in paths, in the reply about it, and in the list of its files."""


def open_registry(repo: Repo, endpoint: str, token: str | None, limits: Limits) -> Hub:
    """Where a repository is asked for. `endpoint`: the hub, for one that is on a hub and names no other."""
    if repo.registry == "ngc":
        return Ngc(repo.endpoint or ENDPOINT, token, limits, repo)
    return Hub(repo.endpoint or endpoint, token, limits, repo)


class Ngc(Hub):
    """NGC, for one artifact."""

    def commit(self, say: Say) -> str:
        """The version; the newest one where none is named."""
        if self.repo.revision != LATEST:
            return self.repo.revision
        latest = self._latest(say)
        if not latest:
            raise WeightsMissing(f"{_place(self.repo)} has no version", f"See what there is: {_page(self.repo)}")
        return latest

    def tree(self, commit: str, say: Say) -> list[HubFile]:
        """Every file of a version. Raises WeightsMissing, naming what is not there."""
        url = f"{self._artifact()}/versions/{quote(commit, safe='')}/files"
        try:
            return self._files(url, commit, say)
        except WeightsMissing as error:
            raise self._what_is_missing(commit, error, say) from None

    def file_url(self, commit: str, path: str) -> str:
        return f"{self._artifact()}/versions/{quote(commit, safe='')}/files/{quote(path)}"

    def _files(self, url: str, commit: str, say: Say) -> list[HubFile]:
        _, _, listed = WORDS[self.repo.repo_type]
        files: list[HubFile] = []
        page, pages = 0, 1
        while page < pages:
            body, _ = self.json(f"{url}?page-number={page}&page-size={PAGE_FILES}", say)
            try:
                files += [_file(entry, self.repo, commit) for entry in body.get(listed) or []]
                pages = int((body.get("paginationInfo") or {}).get("totalPages") or 1)
            except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
                raise HubUnavailable(f"{self.endpoint} does not answer like NGC: {error!r}"[:500]) from error
            page += 1
            self.check_end(len(files), bool(body.get(listed)) or page >= pages)
        return files

    def _latest(self, say: Say) -> str:
        body, _ = self.json(self._artifact(), say)
        found = body.get(WORDS[self.repo.repo_type][1]) if isinstance(body, dict) else None
        if not isinstance(found, dict):
            raise HubUnavailable(f"{self.endpoint} does not answer like NGC: nothing about {_place(self.repo)}")
        latest = str(found.get("latestVersionIdStr") or "")
        if latest and not is_version(latest):
            raise HubUnavailable(f"{self.endpoint} does not answer like NGC: {latest[:80]!r} is no version")
        return latest

    def _what_is_missing(self, commit: str, error: WeightsMissing, say: Say) -> WeightsMissing:
        """The artifact itself, or only this version of it."""
        try:
            latest = self._latest(say)
        except WeightsMissing as missing:
            return missing
        except NimhostError:
            return error
        newest = f" Its newest version is {latest}." if latest else ""
        return WeightsMissing(f"{_place(self.repo)} has no version '{commit}'.{newest}", f"See: {_page(self.repo)}")

    def _artifact(self) -> str:
        org, team, name = (quote(part, safe="") for part in self.repo.repo_id.split("/"))
        below = "" if team == "no-team" else f"/team/{team}"
        return f"{self.endpoint}/v2/org/{org}{below}/{WORDS[self.repo.repo_type][0]}/{name}"

    def _refused(self, error: urllib.error.HTTPError) -> NimhostError:
        try:
            said = str(json.loads(error.read(1 << 16))["requestStatus"]["statusDescription"])[:500]
        except (ValueError, KeyError, TypeError, OSError, RecursionError):
            said = ""
        return refusal(error.code, said, self.repo, self.endpoint, self._token)


def refusal(status: int, text: str, repo: Repo, endpoint: str, key: str | None) -> NimhostError:
    """What a refusal of NGC means. `text`: its own description.

    1 no key · 2 a key that is not valid, or of the kind that only the registry takes · 3 a key without access ·
    4 a licence that is not accepted · 5 no such artifact · 6 the rest.
    """
    place, more = _place(repo), f" ({text})" if text else ""
    if status == 401 and not key:  # 1
        return WeightsGated(f"NGC wants an API key for {place}", f"Make one at {KEYS}, then: {_STORE}")
    if status == 401:  # 2
        legacy = "" if key is None or key.startswith("nvapi-") else " It has to begin with nvapi-: a personal key."
        return WeightsGated(
            f"NGC refuses the API key for {place}{more}.{legacy}", f"Make one at {KEYS}, then: {_STORE}"
        )
    if status == 403:  # 3
        return WeightsGated(
            f"the API key has no access to {place}{more}",
            f"Use a key of the organisation {repo.repo_id.partition('/')[0]} that includes the services 'NGC Catalog' "
            f"and 'Private Registry' ({KEYS}): {_STORE}",
        )
    if status in (412, 451):  # 4
        return WeightsGated(f"the licence of {place} has not been accepted{more}", f"Accept it at {_page(repo)}")
    if status in (400, 404, 410):  # 5
        other = "resource" if repo.repo_type == "model" else "model"
        return WeightsMissing(
            f"there is no {place} at {endpoint}{more}",
            f"Check org, team and name at {_page(repo)}. If it is a {other}: target_type = {other}.",
        )
    return HostError(f"{endpoint} answers {status} for {place}: {text or 'no reason given'}")  # 6


KEYS = "https://org.ngc.nvidia.com/setup/api-keys"
_STORE = (
    "nimhost secrets create ngc-key --from-file -  (paste it), and name it in the fileset: api_key_secret = ngc-key"
)


def _place(repo: Repo) -> str:
    return f"NGC {repo.repo_type} {repo.repo_id}"


def _page(repo: Repo) -> str:
    org, team, name = repo.repo_id.split("/")
    teams = "" if team == "no-team" else f"/teams/{team}"
    return f"https://catalog.ngc.nvidia.com/orgs/{org}{teams}/{WORDS[repo.repo_type][0]}/{name}"


def _file(entry: dict[str, Any], repo: Repo, commit: str) -> HubFile:
    """Where no hash is told, the digest is a name that no other file has."""
    path, size = str(entry["path"]), int(entry["sizeInBytes"])
    told = base64.b64decode(entry.get("sha256_base64") or "", validate=True).hex()
    if told and len(told) != 64:
        raise ValueError(f"'{entry['sha256_base64']}' is not a SHA-256")
    name = hashlib.sha256(f"{repo.repo_id}\0{commit}\0{path}\0{size}".encode()).hexdigest()
    return HubFile(path, size, told or f"unhashed-{name[:40]}")
