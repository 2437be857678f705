"""Reads what a directory of weights says about its model, for `models.checkpoint` to make sense of."""

from __future__ import annotations

import json
from pathlib import Path

from nimhost.entities import Json, ModelSpec
from nimhost.errors import BadRequest
from nimhost.models.checkpoint import Tensor, header_length, is_weights_dir, parse_safetensors_header, read_spec


def describe_weights(directory: Path, name: str = "") -> ModelSpec:
    """The ModelSpec of the checkpoint in `directory` (or its `alternates/hf`); `name`: see `read_spec`.

    Reads small files and the first part of large ones. Raises BadRequest when there is nothing deployable in it.
    """
    if problem := is_weights_dir(str(path.relative_to(directory)) for path in _files(directory)):
        raise BadRequest(f"{directory} cannot be deployed: {problem}")
    root = directory if (directory / "config.json").is_file() else directory / "alternates" / "hf"
    return read_spec(
        _json(root / "config.json"),
        name=name,
        tokenizer_config=_json(root / "tokenizer_config.json"),
        chat_template="chat_template.jinja" if (root / "chat_template.jinja").is_file() else None,
        tensors=read_tensors(root),
    )


def read_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of the safetensors files in `directory`, by name. Raises BadRequest for a file that is none."""
    tensors: dict[str, Tensor] = {}
    for path in sorted(directory.glob("*.safetensors")):
        try:
            with path.open("rb") as file:
                tensors |= parse_safetensors_header(file.read(header_length(file.read(8))))
        except ValueError as error:
            raise BadRequest(f"{path} is not a safetensors file: {error}") from error
    return tensors


def _files(directory: Path) -> list[Path]:
    alternate = directory / "alternates" / "hf"
    return [path for folder in (directory, alternate) if folder.is_dir() for path in folder.iterdir()]


def _json(path: Path) -> Json:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise BadRequest(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadRequest(f"{path} is not a JSON object")
    return content
