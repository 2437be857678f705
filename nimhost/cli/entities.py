"""The up to four entities behind one `nimhost deploy`, and how they differ from what is there already. Pure."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from nimhost.cli.target import Directory, HubModel, Image, Target, split_image
from nimhost.errors import BadRequest

Engine = Literal["nim", "vllm", "generic"]
MADE_BY = "Made by: nimhost deploy"
CONFIG_PARTS = ("model_spec", "executor_config")
_IMAGE_KEY = "What opens NVIDIA's registry is the secret system/ngc-api-key."


class Options(Struct, frozen=True, kw_only=True):
    """What was asked for besides the model."""

    name: str
    workspace: str
    engine: Engine | None = None
    gpus: int = 1
    gpu_memory_gib: float | None = None
    image: str | None = None
    args: tuple[str, ...] = ()
    env: dict[str, str] = {}
    health_path: str | None = None
    token_secret: str | None = None
    lora: bool | None = None
    """Whether it takes adapters; None: as it does already."""
    force: bool = False


class Wanted(Struct, frozen=True):
    """One entity as it should be. `resource` is the client's word for its kind; None is a field that is not set."""

    resource: Literal["filesets", "models", "deployment_configs", "deployments"]
    fields: dict[str, Any]
    comment: str | None = None

    def body(self, found: Any = None) -> dict[str, Any]:
        """The fields to send. What `found`, which is there, says of a config beyond these fields stays as it is."""
        said: dict[str, Any] = _without_none(self.fields)
        if found is not None and self.resource == "deployment_configs":
            said |= {part: _kept(found.get(part), self.fields[part]) | said[part] for part in CONFIG_PARTS}
        return said if self.comment is None else {**said, "description": self.comment[:255]}


def entities_for(target: Target, options: Options) -> list[Wanted]:
    """In the order in which they can be created. Raises BadRequest for options that do not go together."""
    if options.token_secret and not isinstance(target, HubModel):
        what, more = ("a directory", "") if isinstance(target, Directory) else ("an image", f" {_IMAGE_KEY}")
        raise BadRequest(
            f"--hf-token-secret opens a repository of the model hub, and {_shown(target)} is {what}.",
            f"Leave it out.{more}",
        )
    ref = f"{options.workspace}/{options.name}"
    comment = f"{MADE_BY} {_shown(target)}"
    weights = [] if isinstance(target, Image) else [
        Wanted("filesets", {"storage": _storage(target, options), "purpose": "model"}, comment),
        Wanted("models", {"fileset": ref}, comment),
    ]  # fmt: skip
    config = Wanted("deployment_configs", _config(target, options), comment)
    return [*weights, config, Wanted("deployments", {"config": options.name, "force": options.force or None})]


def _shown(target: Target) -> str:
    match target:
        case HubModel(repo_id, revision):
            return f"{repo_id}@{revision}" if revision else repo_id
        case Directory(path):
            return path
        case Image(name, tag):
            return f"{name}:{tag}" if tag else name


def _storage(target: HubModel | Directory, options: Options) -> dict[str, Any]:
    if isinstance(target, Directory):
        return {"type": "local", "path": target.path}
    hub = {"type": "huggingface", "repo_id": target.repo_id, "repo_type": "model"}
    return {**hub, "revision": target.revision or "main", "token_secret": options.token_secret}


def _config(target: Target, options: Options) -> dict[str, Any]:
    engine = options.engine or ("nim" if isinstance(target, Image) else "vllm")
    image: str | None
    if isinstance(target, Image):
        if engine == "vllm":
            raise BadRequest("vLLM needs a model, not only an image.", "nimhost deploy OWNER/MODEL --image NAME:TAG")
        if options.image:
            raise BadRequest("The image is given twice: as MODEL and with --image.", "Leave one of them out.")
        image, tag = target.name, target.tag
        model: dict[str, str | bool | None] = {
            "model_namespace": None,
            "model_name": target.label if engine == "nim" else None,
        }
    else:
        image, tag = split_image(options.image) if options.image else (None, None)
        model = {"model_namespace": options.workspace, "model_name": options.name}
    if options.lora is not None:
        model = {**model, "lora_enabled": options.lora}
    if engine == "generic" and not (image and options.health_path):
        missing = "--health-path PATH" if image else "--image NAME:TAG"
        raise BadRequest("A generic engine is an image and the path that says it is ready.", f"Add: {missing}")
    executor = {
        "gpu": options.gpus,
        "gpu_memory_gib": options.gpu_memory_gib,
        "image_name": image,
        "image_tag": tag,
        "health_check_path": options.health_path,
        "additional_args": list(options.args),
        "additional_envs": options.env,
    }
    return {"engine": engine, "model_spec": model, "executor_config": executor}


def differences(wanted: dict[str, Any], found: Any, path: str = "") -> list[str]:
    """One line for each field of `wanted` that `found` has otherwise. Empty and missing are the same."""
    lines = []
    for name, want in wanted.items():
        have = (found or {}).get(name)
        where = f"{path}{name}"
        if name == "revision" and (found or {}).get("original_revision"):
            have = found["original_revision"]  # what was asked for; `revision` is the commit it was resolved to
        if isinstance(want, dict) and where != "executor_config.additional_envs":
            lines += differences(want, have, f"{where}.")
        elif (want or None) != (have or None) and not _same_ref(name, want, have):
            lines.append(f"{where}: {_word(have)} there, {_word(want)} wanted")
    return lines


def _kept(found: Any, fields: dict[str, Any]) -> dict[str, Any]:
    """What no option says anything about."""
    return {key: value for key, value in (found or {}).items() if key not in fields and value is not None}


def _same_ref(name: str, want: object, have: object) -> bool:
    """`name` and `workspace/name` of the same thing."""
    return name in ("config", "fileset") and str(want).rpartition("/")[2] == str(have).rpartition("/")[2]


def _word(value: object) -> str:
    return "nothing" if value in (None, [], {}, "") else str(value)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without_none(item) for name, item in value.items() if item is not None}
    return value
