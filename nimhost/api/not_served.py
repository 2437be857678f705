"""What answers where nothing is: parts of the platform that nimhost does not have say so."""

from __future__ import annotations

import re

from starlette.types import Receive, Scope, Send

from nimhost.errors import NotFound

_WORKSPACE = "/apis/entities/v2/workspaces/[^/]+"
_PARTS = {
    rf"{_WORKSPACE}/members(/.*)?": "members of workspaces: whoever has an API token may use all of them",
    rf"{_WORKSPACE}/entities(/.*)?": "entities of other kinds than its own",
    r"/apis/models/v2/workspaces/[^/]+/prompts(/.*)?": "prompts of their own: a model has one, in its field 'prompt'",
    r"/apis/files/v2/hf/.*": "a proxy that looks like the Hugging Face hub: engines get the weights mounted",
    r"/apis/jobs/.*": "jobs",
}
"""Paths of the platform, and what they would be."""
_SEE = "What there is: /openapi.json"


async def answer_not_found(scope: Scope, receive: Receive, send: Send) -> None:
    """Raises NotFound, always."""
    raise explain_absence(scope["path"])


def explain_absence(path: str) -> NotFound:
    for pattern, what in _PARTS.items():
        if re.fullmatch(pattern, path):
            return NotFound(f"nimhost does not have {what}.", _SEE)
    return NotFound("Not Found")
