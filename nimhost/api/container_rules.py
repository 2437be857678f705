"""What may stand in the texts that a container is made of. Pure: whether an image exists is seen when it is pulled."""

from __future__ import annotations

import re

from nimhost.entities import ExecutorConfig
from nimhost.errors import InvalidRequest

_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_HOST = r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9a-fA-F:]+\])(?::[0-9]+)?"
_PART = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_DIGEST = r"[A-Za-z][A-Za-z0-9+._-]*:[0-9a-fA-F]{32,}"
_IMAGE = re.compile(rf"(?:{_HOST}/)?{_PART}(?:/{_PART})*(?P<tag>:{_TAG})?(?P<digest>@{_DIGEST})?")
"""https://pkg.go.dev/github.com/distribution/reference#pkg-overview"""


def check_container(executor: ExecutorConfig) -> None:
    """Raises InvalidRequest, naming the field."""
    _check_image(executor.image_name, executor.image_tag)
    for name, value in (executor.additional_envs or {}).items():
        if not _ENV_NAME.fullmatch(name):
            raise _wrong(f"'{name}' cannot be the name of an environment variable", "additional_envs", name)
        _check_text(value, "additional_envs", name)
    for place, argument in enumerate(executor.additional_args):
        _check_text(argument, "additional_args", place)
    _check_text(executor.health_check_path or "", "health_check_path")


def _check_image(name: str | None, tag: str | None) -> None:
    found = _IMAGE.fullmatch(name) if name is not None and len(name) <= 512 else None
    if name is not None and found is None:
        raise _wrong("Input should be the name of an image, such as nvcr.io/nim/meta/llama3", "image_name", input=name)
    if tag is None:
        return
    if not re.fullmatch(_TAG, tag):
        raise _wrong("Input should be the tag of an image: letters, digits, '_', '.' and '-'", "image_tag", input=tag)
    if found and (found["tag"] or found["digest"]):
        raise _wrong("The image_name has a tag or a digest already: leave one of the two out", "image_tag", input=tag)


def _check_text(text: str, *field: str | int) -> None:
    """The system ends a text where it has a zero."""
    if "\0" in text:
        raise _wrong("The character U+0000 cannot stand here", *field)


def _wrong(message: str, *field: str | int, input: object = None) -> InvalidRequest:
    return InvalidRequest.field(message, "executor_config", *field, input=input)
