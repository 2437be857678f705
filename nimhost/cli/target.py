"""What the MODEL of `nimhost deploy MODEL` is."""

from __future__ import annotations

import os.path
import re
from typing import NamedTuple

from nimhost.errors import BadRequest
from nimhost.refs import NAME_RULE, is_name, slug


class HubModel(NamedTuple):
    """A repository of the model hub."""

    repo_id: str
    revision: str | None = None


class Directory(NamedTuple):
    """Weights on this machine, by reference."""

    path: str


class Image(NamedTuple):
    """A container image that brings its model; `label` is what it calls the model."""

    name: str
    tag: str | None
    label: str


Target = HubModel | Directory | Image

_REPO = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
FORMS = (
    "MODEL is a hub repository (Qwen/Qwen3-1.7B), a directory (./my-model), or an image "
    "(nvcr.io/nim/meta/llama-3.2-1b-instruct:1.8.6)."
)


def read_target(text: str) -> Target:
    """`parse_target` of what this machine has under that name."""
    path = os.path.expanduser(text)
    return parse_target(text, os.path.isdir(path), os.path.isfile(path))


def parse_target(text: str, is_dir: bool, is_file: bool = False) -> Target:
    """First match wins. `is_dir`, `is_file`: there is one of that name. Raises BadRequest for what is none of them.

    1 written like a path, or the name of a directory → Directory (an existing one, as an absolute path); no file
    2 a registry host before the first slash, or a tag at the end (no repository has a colon) → Image
    3 `name` or `owner/name`, with `@revision` or without → HubModel
    """
    if text in (".", "..", "~") or text.startswith(("./", "../", "/", "~/")) or is_dir or is_file:  # 1
        if is_file:
            folder = os.path.dirname(text) or "."
            raise BadRequest(
                f"{text} is a file: the weights of a model are a directory.",
                f"Name its directory: nimhost deploy {folder}",
            )
        if not is_dir:
            raise BadRequest(f"There is no directory {text}.", FORMS)
        return Directory(os.path.abspath(os.path.expanduser(text)))
    host, slash, path = text.partition("/")
    if (slash and _is_host(host)) or _has_tag(text):  # 2
        name, tag = split_image(text)
        return Image(name, tag, _label(split_image(path)[0] if slash and _is_host(host) else name))
    repo_id, at, revision = text.partition("@")
    if not _REPO.fullmatch(repo_id) or (at and not revision):  # 3
        raise BadRequest(f"'{text}' is not something to deploy.", FORMS)
    return HubModel(repo_id, revision or None)


def _is_host(text: str) -> bool:
    return "." in text or ":" in text or text == "localhost"


def _has_tag(text: str) -> bool:
    return ":" in text.rpartition("/")[2]


def split_image(text: str) -> tuple[str, str | None]:
    """`registry:5000/name:tag` → name and tag. A digest stays with the name."""
    folder, slash, last = text.rpartition("/")
    if "@" in last:
        return text, None
    name, _, tag = last.partition(":")
    return f"{folder}{slash}{name}", tag or None


def _label(path: str) -> str:
    """`nim/meta/llama` and `meta/llama` → `meta/llama`."""
    return path.partition("@")[0].removeprefix("nim/")


def name_for(target: Target) -> str:
    """The slug that names everything `deploy` makes for it. Raises BadRequest when none can be made."""
    match target:
        case HubModel(repo_id):
            text = repo_id
        case Directory(path):
            text = os.path.basename(path)
        case Image(label=label):
            text = label
    name = slug(text)
    if not is_name(name):
        raise BadRequest(f"No name can be made of '{text}': {NAME_RULE}.", "Give one with --name NAME.")
    return name
