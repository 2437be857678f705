"""Names and references: `workspace/name`, slugs for ids that others chose, and served names of adapters."""

from __future__ import annotations

import hashlib
import re
from typing import NamedTuple

from nimhost.errors import InvalidRequest

NAME_RULE = (
    "2 to 63 characters: letters, digits, '-', '_' and '.'; it starts with a letter or digit, "
    "has no '--' and does not end with '-'"
)
PROJECT = r"^[A-Za-z0-9_./-]+$"
"""What a request may call a project."""
_NAME = re.compile(r"[A-Za-z0-9](?!.*--)[A-Za-z0-9._-]{1,62}(?<!-)")
ALL_WORKSPACES = "-"
DEFAULT_WORKSPACE = "default"
SYSTEM_WORKSPACE = "system"


class Ref(NamedTuple):
    workspace: str
    name: str

    def __str__(self) -> str:
        return f"{self.workspace}/{self.name}"


NGC_KEY = Ref(SYSTEM_WORKSPACE, "ngc-api-key")
"""The secret that NVIDIA's registry and hosted models are used with."""


def is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None


def check_name(text: str, *loc: str | int) -> str:
    """`text` if it can name a resource.

    Raises InvalidRequest, naming the field `loc` of the body (by default `name`).
    """
    if is_name(text):
        return text
    raise InvalidRequest.field(f"'{text}' is not a valid name: {NAME_RULE}", *(loc or ("name",)), input=text)


def parse_ref(text: str, workspace: str, *loc: str | int) -> Ref:
    """`name` (in `workspace`) or `workspace/name`.

    Raises InvalidRequest, naming the field `loc`, for anything else.
    """
    first, slash, rest = text.partition("/")
    ref = Ref(first, rest) if slash else Ref(workspace, first)
    for part in ref:
        check_name(part, *loc)
    return ref


def slug(text: str, workspace: str = "") -> str:
    """The name nimhost gives to something that others named: `meta/llama-3.2-1b` is `meta-llama-3-2-1b`.

    Lower case, runs of anything but letters and digits become '-', a leading digit gets 'm-', longer than 63 is cut to
    54 and eight hex digits of the SHA-256 of the original. A leading `workspace/` goes first.
    """
    own = text.removeprefix(f"{workspace}/") if workspace else text
    name = re.sub(r"[^a-z0-9]+", "-", own.lower()).strip("-")
    if name[:1].isdigit():
        name = f"m-{name}"
    if len(name) > 63:
        name = f"{name[:54]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
    return name


def adapter_served_name(adapter: Ref) -> str:
    """What an engine calls an adapter: `workspace--name`. Names have no '--', so this can be taken apart again."""
    return f"{adapter.workspace}--{adapter.name}"


def is_adapter_name(text: str) -> bool:
    """Whether it is the served name of an adapter."""
    workspace, dashes, name = text.partition("--")
    return bool(dashes) and is_name(workspace) and is_name(name)
