"""What to do about something that is not there: the words of the reply are fixed by the wire, the next step is ours."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from functools import cache

from nimhost.cli.options import open_client, settings
from nimhost.errors import NimhostError
from nimhost.kinds import KINDS, Kind

LOOK_TIMEOUT_S = 2.0
NEAR_SHOWN = 3
_VERSION = re.compile(r"(?P<label>[A-Z][a-z ]+) '(?P<workspace>[^/']+)/(?P<name>[^/']+)' has no version \d+")
_FILE = re.compile(r"File '.*' not found in fileset '(?P<workspace>[^/']+)/(?P<name>[^/']+)'")


def next_step(message: str) -> str | None:
    """What to type after a 404 that says this: the command that lists what there is, and what has a similar name."""
    if found := _FILE.fullmatch(message):
        return f"See which there are: nimhost files list {found['name']}{_where(found['workspace'])}"
    if (found := _VERSION.fullmatch(message)) and (kind := _labelled(found["label"])):
        return f"See which there are: nimhost {kind.cli} versions list {found['name']}{_where(found['workspace'])}"
    what = find_missing(message)
    if what is None:
        return None
    kind, workspace, name = what
    command = "ps" if kind.key == "deployments" else f"{kind.cli} list"
    near = difflib.get_close_matches(name, _names(kind, workspace), n=NEAR_SHOWN)
    meant = f"Did you mean {' or '.join(near)}? " if near else ""
    return f"{meant}See which there are: nimhost {command}{_where(workspace) if kind.in_workspace else ''}"


def find_missing(message: str) -> tuple[Kind, str, str] | None:
    """Kind, workspace (empty: none) and name of what such a message says is not there. Pure."""
    for kind in KINDS.values():
        if found := _pattern(kind.key).fullmatch(message):
            said = found.groupdict()
            return kind, said.get("workspace", ""), said["name"]
    return None


@cache
def _pattern(key: str) -> re.Pattern[str]:
    """The kind's words for what is missing, with workspace and name to be read out."""
    kind = KINDS[key]
    words = re.escape(kind.missing.format(label=kind.label, workspace="<workspace>", name="<name>"))
    part = r"(?P<{}>[^/'\s]+)"
    return re.compile(words.replace("<workspace>", part.format("workspace")).replace("<name>", part.format("name")))


def _labelled(label: str) -> Kind | None:
    return next((kind for kind in KINDS.values() if kind.label == label), None)


def _where(workspace: str) -> str:
    return "" if workspace == settings().workspace else f" --workspace {workspace}"


def _names(kind: Kind, workspace: str) -> Sequence[str]:
    """What there is of that kind; nothing when that cannot be had at once: the error is what matters."""
    try:
        with open_client(timeout_s=LOOK_TIMEOUT_S) as client:
            resource = getattr(client, kind.key.replace("-", "_"))
            page = resource.page(workspace=workspace or None, page_size=str(kind.page_size_max))
    except NimhostError:
        return ()
    return [row["name"] for row in page["data"]]
