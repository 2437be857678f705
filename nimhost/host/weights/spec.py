"""Reads what the small files and the first bytes of the large ones say about a model, for `models.checkpoint`."""

from __future__ import annotations

import asyncio
import json

from nimhost.entities import Json, ModelSpec
from nimhost.errors import BadRequest
from nimhost.host.weights.choice import HubFile, choose_files
from nimhost.host.weights.source import Source
from nimhost.models.checkpoint import is_weights_dir, read_spec
from nimhost.models.tensors import Tensor, header_length, parse_safetensors_header

PARALLEL = 8
FIRST_BYTES = 32 * 1024
"""Enough for the header of most files: one request each."""
SMALL_FILE_BYTES = 16 << 20
ALTERNATE = "alternates/hf/"
INDEX = "model.safetensors.index.json"


async def describe_weights(source: Source, name: str = "") -> ModelSpec:
    """The ModelSpec of the checkpoint in `source` (or in its `alternates/hf`); `name`: see `read_spec`.

    `generation_config.json` is not read: nothing in it is part of a ModelSpec. Raises BadRequest when there is nothing
    deployable, and what reading raises.
    """
    names = await source.names()
    if problem := is_weights_dir(names):
        raise BadRequest(f"{source} cannot be deployed: {problem}")
    root = "" if "config.json" in names else ALTERNATE
    there = {name.removeprefix(root) for name in names if name.startswith(root)}
    await _check_complete(source, root, there)
    config, tokenizer_config, tensors = await asyncio.gather(
        _json(source, root, "config.json", there),
        _json(source, root, "tokenizer_config.json", there),
        read_tensors(source, [root + name for name in checkpoint_files(there)]),
    )
    return read_spec(
        config,
        name=name,
        tokenizer_config=tokenizer_config,
        chat_template="chat_template.jinja" if "chat_template.jinja" in there else None,
        tensors=tensors,
    )


async def _check_complete(source: Source, root: str, there: set[str]) -> None:
    """Files that the index speaks of may still be on their way: half of the tensors make another model."""
    index = await _json(source, root, INDEX, there)
    parts = index.get("weight_map")
    missing = sorted({str(name) for name in parts.values()} - there) if isinstance(parts, dict) else []
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise BadRequest(f"{source} is not complete: {missing[0]}{more} of its {INDEX} is not there")


def checkpoint_files(names: set[str]) -> list[str]:
    """The safetensors files that together are the checkpoint: those an engine would be given."""
    chosen = choose_files([HubFile(name, 0, "") for name in sorted(names)])
    return [file.path for file in chosen if file.path.endswith(".safetensors") and "/" not in file.path]


async def read_tensors(source: Source, paths: list[str]) -> dict[str, Tensor]:
    """Every tensor of these safetensors files, by name. Raises BadRequest for a file that is none."""
    room = asyncio.Semaphore(PARALLEL)

    async def header(path: str) -> dict[str, Tensor]:
        async with room:
            return await _header(source, path)

    found: dict[str, Tensor] = {}
    for tensors in await asyncio.gather(*map(header, paths)):
        found |= tensors
    return found


async def _header(source: Source, path: str) -> dict[str, Tensor]:
    try:
        start = await source.read(path, FIRST_BYTES)
        stop = 8 + header_length(start)
        if stop > FIRST_BYTES:
            start = await source.read(path, stop)
        return parse_safetensors_header(start[8:stop])
    except ValueError as error:
        raise BadRequest(f"{path} of {source} is not a safetensors file: {error}") from error


async def _json(source: Source, root: str, name: str, there: set[str]) -> Json:
    if name not in there:
        return {}
    try:
        content = json.loads(await source.read(root + name, SMALL_FILE_BYTES))
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{name} of {source} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise BadRequest(f"{name} of {source} is not a JSON object")
    return content
