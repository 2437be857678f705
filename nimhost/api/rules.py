"""What must hold for a wish to be accepted.

`complete(...)` runs inside the transaction that writes, so what it finds is still true when the row appears.
"""

from __future__ import annotations

import os
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from msgspec.structs import replace

from nimhost.api.access import settings_for_asker
from nimhost.api.container_rules import check_container
from nimhost.api.engine_gates import check_gates
from nimhost.api.model_rules import check_engine
from nimhost.api.own_address import check_not_own
from nimhost.api.references import Reader
from nimhost.auth_header import NOT_SETTABLE, check_auth_header
from nimhost.config import Settings, data_dir, ngc_api_key
from nimhost.deployments.desired import model_ref
from nimhost.entities import (
    Adapter,
    Deployment,
    DeploymentConfig,
    Entity,
    Fileset,
    HuggingFaceStorage,
    LocalStorage,
    Model,
    NgcStorage,
    Provider,
    Secret,
    VirtualModel,
    Wish,
)
from nimhost.errors import BadRequest, InvalidRequest
from nimhost.host.weights import ngc
from nimhost.kinds import KINDS
from nimhost.refs import NGC_KEY, PROJECT, Ref, is_name, parse_ref

Json = dict[str, Any]
_HUB_PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_NGC_NAME = re.compile(r"[A-Za-z0-9](?!.*(\.\.|--))[\w.-]*")
_NGC_VERSION = re.compile(r"[A-Za-z0-9](?!.*\.\.)[\w.+@=-]*")
_FORBIDDEN_HEADERS = {"authorization": "Authorization", "cookie": "Cookie"}


async def complete(kind: str, wish: Wish, workspace: str, db: Reader, settings: Settings) -> Any:
    """The wish as it is to be stored. Raises BadRequest, InvalidRequest, Forbidden."""
    if kind != "filesets":  # there it is any text
        check_project(getattr(wish, "project", None))
    rule = RULES.get(kind)
    return wish if rule is None else await rule(wish, workspace, db, settings_for_asker(settings))


def check_project(project: str | None) -> None:
    if project is not None and not re.fullmatch(PROJECT.removesuffix("$"), project):
        raise InvalidRequest.field(
            f"String should match pattern '{PROJECT}'", "project", input=project, type="string_pattern_mismatch"
        )


async def check_workspace(workspace: str, db: Reader) -> None:
    if not await db.find("workspaces", "", workspace):
        raise InvalidRequest(
            f"Workspace '{workspace}' does not exist. Please create the workspace first.",
            hint=f"nimhost workspaces create {workspace}" if is_name(workspace) else None,
        )


# --- secrets, filesets, models -------------------------------------------------------------------------------------


async def _secret(wish: Secret, workspace: str, db: Reader, settings: Settings) -> Secret:
    return replace(wish, value=strip_newline(wish.value))


def strip_newline(value: str) -> str:
    """Without the newline that `echo KEY |` and editors leave. Raises InvalidRequest when nothing is left."""
    text = value.removesuffix("\n").removesuffix("\r")
    if not text.strip():
        raise InvalidRequest.field("Value should not be empty", "value")
    return text


def check_storage(raw: object) -> None:
    """What is wrong with a storage before its fields are looked at."""
    if isinstance(raw, dict) and raw.get("type") == "s3":
        raise BadRequest(
            "S3 storage is not supported by nimhost.",
            hint="Use 'local' storage (upload files or name a directory), 'huggingface' or 'ngc'.",
        )


async def _fileset(wish: Fileset, workspace: str, db: Reader, settings: Settings) -> Fileset:
    match wish.storage:
        case LocalStorage(path=str(path)):
            check_local_path(path, settings.files.allow_local_paths)
            check_apart(path, data_dir(settings))
        case HuggingFaceStorage() as hub:
            check_remote(hub)
            await _need_secret(hub.token_secret, workspace, db, "token_secret")
        case NgcStorage() as ngc:
            check_remote(ngc)
            await _need_secret(ngc.api_key_secret, workspace, db, "api_key_secret")
    return wish


def check_local_path(path: str, allowed: bool) -> None:
    if not allowed:
        raise BadRequest(
            "Directories of this machine cannot be used as a fileset here.",
            hint="Set files.allow_local_paths = true in nimhost.toml, or upload the files into the fileset.",
        )
    if not os.path.isabs(path) or "\0" in path or not os.path.isdir(path):
        raise BadRequest(
            f"storage.path: '{path}' is not an absolute path of a directory on the machine that runs nimhost.",
            hint=f"Try: ls -d {os.path.abspath(path)}" if path and "\0" not in path else None,
        )


def check_apart(path: str, data: Path) -> None:
    """Whoever reads files of a fileset must not read the key and the database. Raises BadRequest."""
    wanted, ours = Path(path).resolve(), data.resolve()
    if wanted == ours or wanted in ours.parents or ours in wanted.parents:
        raise BadRequest(
            f"storage.path: '{path}' and nimhost's own data directory are not apart.",
            hint="Name the directory that has the model's files, or upload them into the fileset.",
        )


def check_remote(storage: HuggingFaceStorage | NgcStorage) -> None:
    """Whether it names something that can exist."""
    if isinstance(storage, HuggingFaceStorage):
        check_repo_id(storage.repo_id)
        return
    if urlsplit(storage.host).scheme not in ("http", "https") or not urlsplit(storage.host).hostname:
        raise BadRequest(f"storage.host: '{storage.host}' is not an address.", hint=f"NGC's is {ngc.ENDPOINT}")
    parts = {"org": storage.org, "team": storage.team, "target": storage.target, "version": storage.version}
    for field, text in parts.items():
        rule = _NGC_VERSION if field == "version" else _NGC_NAME
        if text is not None and not rule.fullmatch(text):
            raise BadRequest(
                f"storage.{field}: '{text}' cannot be the name of something on NGC.",
                hint="As in the catalogue: org nvidia, team nemo (no-team: none), target my-model, version 1.0.",
            )


def check_repo_id(repo_id: str) -> None:
    parts = repo_id.split("/")
    if not 1 <= len(parts) <= 2 or not all(_HUB_PART.fullmatch(p) and ".." not in p and "--" not in p for p in parts):
        raise BadRequest(
            f"storage.repo_id: '{repo_id}' is not the id of a Hugging Face repository.",
            hint="It looks like 'Qwen/Qwen3-1.7B', without host name and revision.",
        )


async def _need_secret(ref: str | None, workspace: str, db: Reader, field: str) -> None:
    if ref is None:
        return
    where = parse_ref(ref, workspace, "storage", field)
    if not await _has_secret(where, db):
        raise BadRequest(f"Secret not found: {ref}", hint=f"nimhost secrets create {where.name} --from-file -")


async def _has_secret(ref: Ref, db: Reader) -> bool:
    """The NGC key of the environment counts."""
    return bool(await db.find("secrets", *ref)) or (ref == NGC_KEY and ngc_api_key() is not None)


async def _model(wish: Model, workspace: str, db: Reader, settings: Settings) -> Model:
    if wish.fileset is not None:
        await _need_fileset(wish.fileset, workspace, db)
    return wish


async def _need_fileset(ref: str, workspace: str, db: Reader) -> None:
    where = parse_ref(ref, workspace, "fileset")
    if not await db.find("filesets", *where):
        raise BadRequest(
            f"Fileset '{ref}' not found in workspace '{workspace}'",
            hint=f"nimhost files filesets create {where.name} --workspace {where.workspace}",
        )


async def _adapter(wish: Adapter, workspace: str, db: Reader, settings: Settings) -> Adapter:
    model = parse_ref(wish.model, workspace, "model")
    if not await db.find("models", *model):
        raise KINDS["models"].not_found(*model)
    await _need_fileset(wish.fileset, workspace, db)
    return replace(wish, model=str(model))


async def _virtual_model(wish: VirtualModel, workspace: str, db: Reader, settings: Settings) -> VirtualModel:
    for field in ("request_middleware", "response_middleware", "post_response_middleware", "override_proxy"):
        if getattr(wish, field):
            raise InvalidRequest.field("nimhost runs no middleware: a virtual model is another name for a model", field)
    if wish.default_model_entity is None:
        return wish
    model = parse_ref(wish.default_model_entity, workspace, "default_model_entity")
    return replace(wish, default_model_entity=str(model))


# --- deployment configs --------------------------------------------------------------------------------------------


async def _config(wish: DeploymentConfig, workspace: str, db: Reader, settings: Settings) -> DeploymentConfig:
    check_config(wish)
    check_engine(wish, workspace, settings)
    await check_gates(wish, workspace, db, settings)
    if wish.model_entity_id is not None:
        parse_ref(wish.model_entity_id, workspace, "model_entity_id")
        return wish
    entity = model_ref(wish.model_spec, workspace)
    if entity and await db.find("models", *entity):
        return replace(wish, model_entity_id=str(entity))
    return wish


def check_config(wish: DeploymentConfig) -> None:
    """The rules that need nothing but the config itself."""
    spec, executor = wish.model_spec, wish.executor_config
    if spec.model_revision is not None and "@" in (spec.model_name or ""):
        raise BadRequest(
            "model_spec.model_revision cannot be set when model_spec.model_name has a revision ('name@revision').",
            hint="Say the revision in one of the two places.",
        )
    if wish.engine == "generic":
        _check_generic(wish)
    check_container(executor)


def _check_generic(wish: DeploymentConfig) -> None:
    executor = wish.executor_config
    for field, why in (
        ("image_name", "no platform default exists for a generic container"),
        ("health_check_path", "no platform default exists for a generic container"),
    ):
        value = getattr(executor, field)
        if not value or not value.strip():
            raise BadRequest(f"The 'generic' engine requires executor_config.{field} to be set ({why}).")
        if value != value.strip():
            raise BadRequest(f"executor_config.{field} must not begin or end with a blank.")
    if wish.model_spec.lora_enabled:
        raise BadRequest("The 'generic' engine does not support model_spec.lora_enabled.")


# --- deployments, providers ----------------------------------------------------------------------------------------


async def find_config(wish: Deployment, workspace: str, db: Reader) -> Entity:
    """The config that a deployment names. Raises BadRequest."""
    first, slash, rest = wish.config.partition("/")
    name = rest if slash and first == workspace else wish.config
    config = await db.find("deployment-configs", workspace, name)
    if config is None:
        raise BadRequest(
            f"Deployment config '{workspace}/{name}' does not exist",
            hint=f"nimhost inference deployment-configs list --workspace {workspace}",
        )
    return config


async def _deployment(wish: Deployment, workspace: str, db: Reader, settings: Settings) -> Deployment:
    config = await find_config(wish, workspace, db)
    return replace(wish, config=config.name)


async def _provider(wish: Provider, workspace: str, db: Reader, settings: Settings) -> Provider:
    check_provider(wish)
    check_not_own(wish.host_url, settings.server)
    secret = wish.api_key_secret_name
    if secret is not None and not await _has_secret(Ref(workspace, secret), db):
        raise BadRequest(
            f"Secret '{secret}' not found in workspace '{workspace}'",
            hint=f"nimhost secrets create {secret} --from-file - --workspace {workspace}",
        )
    return wish


def check_provider(wish: Provider) -> None:
    check_url(wish.host_url)
    for field in ("default_extra_headers", "required_extra_headers"):
        for name, value in (getattr(wish, field) or {}).items():
            if word := _FORBIDDEN_HEADERS.get(name.strip().lower()):
                advice = " Use api_key_secret_name for authentication." if word == "Authorization" else ""
                raise BadRequest(f"{word} header is not allowed in {field}.{advice}")
            if not re.fullmatch(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+", name) or re.search(r"[\r\n\0]", value):
                raise InvalidRequest.field("Not a header: a token as name, one line as value", field, name)
            if name.lower() in NOT_SETTABLE:
                raise InvalidRequest.field("nimhost sets this header itself, for every request", field, name)
    if wish.auth_header_format is not None:
        check_auth_header(wish.auth_header_format)


def check_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
    except ValueError:
        good = False
    if not good or not url.isprintable() or " " in url or parts.username or parts.query or parts.fragment:
        raise InvalidRequest.field(
            "Input should be an http:// or https:// URL of a host, without user name, query and fragment",
            "host_url",
            input=url,
            type="url_parsing",
        )


RULES: dict[str, Callable[[Any, str, Reader, Settings], Awaitable[Wish]]] = {
    "secrets": _secret,
    "filesets": _fileset,
    "models": _model,
    "adapters": _adapter,
    "virtual-models": _virtual_model,
    "deployment-configs": _config,
    "deployments": _deployment,
    "providers": _provider,
}
