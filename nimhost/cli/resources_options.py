"""Fields of a kind as options of a command, and what was given as the body to send."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import click
from msgspec.structs import FieldInfo
from msgspec.structs import fields as struct_fields

from nimhost.cli.options import F, complete_names, read_input, read_secret
from nimhost.cli.structures import read_structure
from nimhost.kinds import Kind

CHOICES_SHOWN = 8
NAMED = {
    "fileset": "filesets", "model": "models", "base_model": "models", "model_entity_id": "models",
    "default_model_entity": "models", "config": "deployment-configs", "api_key_secret_name": "secrets",
    "project": "projects",
}  # fmt: skip
"""A field that names something of another kind -> that kind, for the shell to complete."""
FIELDS = {
    "description": "What it is, in your words.",
    "project": "Label to find it by.",
    "fileset": "Fileset with its files: NAME or WORKSPACE/NAME.",
    "model": "The model that it goes with: NAME or WORKSPACE/NAME.",
    "enabled": "Whether it is in use.",
    "finetuning_type": "How it was made; only 'lora' is loaded into engines.  [default: lora]",
    "lora_config": "What its files do not tell: '{\"rank\": 16}'.",
    "spec": "What is known of its checkpoint. Without it: read from its files.",
    "base_model": "The model that it was made from.",
    "api_endpoint": 'Where it is served, if not here: \'{"url": …, "model_id": …}\'.',
    "backend_format": "What its API is.",
    "prompt": "How it is to be prompted; kept, and not used.",
    "ownership": "Whose it is; kept, and not used.",
    "custom_fields": "Whatever you want to keep with it, as an object.",
    "trust_remote_code": "Whether code that comes with its weights may run.",
    "storage": 'Where its files are: \'{"type": "huggingface", "repo_id": …}\'. Without it: here, to be uploaded.',
    "purpose": "What its files are.",
    "metadata": "What is known of its files, such as how a model calls tools.",
    "cache": "Taken, and without effect.",
    "engine": "What runs it.",
    "model_spec": 'Which model: \'{"model_namespace": …, "model_name": …}\'; tool calling, adapters.',
    "executor_config": 'GPUs and image: \'{"gpu": 1, "image_name": …, "image_tag": …}\'; arguments, environment.',
    "model_entity_id": "The model that it deploys.",
    "config": "The config that it runs.",
    "config_version": "Stay at this version.  [default: follow the newest]",
    "desired": "What it is to be.",
    "force": "Start it although the sum says that it does not fit.",
    "host_url": "Where its API is, such as https://api.openai.com/v1.",
    "api_key_secret_name": "Secret with the key that opens it.",
    "auth_header_format": "How the key is sent.  [default: Authorization: Bearer {{ auth_secret }}]",
    "enabled_models": "Only these of its models. May be given several times.",
    "default_extra_body": "Fields that requests get if they have them not.",
    "default_extra_headers": "Headers that requests get if they have them not.",
    "required_extra_body": "Fields that every request gets.",
    "required_extra_headers": "Headers that every request gets.",
    "model_deployment_id": "The deployment that it belongs to.",
    "model_provider_id": "The provider that requests go through.",
    "served_models": 'What it serves: \'[{"model_entity_id": …, "served_model_name": …}]\'.',
    "status": "How it is.",
    "status_message": "Why.",
    "default_model_entity": "The model that it is another name for.",
    "models": "What else it could be a name for; kept, and not used.",
    "autoprovisioned": "Whether nimhost made it.",
}
"""What a field is."""
REFUSED = ("request_middleware", "response_middleware", "post_response_middleware", "override_proxy")
"""Fields of the reference that nimhost says no to: options that no help shows."""
DEFAULTS = {"finetuning_type": "lora"}
"""Of fields that a body must have, and a person need not say."""


def structure(text: str) -> Any:
    """The type of an option whose value has a structure."""
    try:
        return read_structure(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def wish_fields(kind: Kind, update: bool = False) -> list[FieldInfo]:
    """What a create may carry, or an update; the secret fields have options of their own."""
    fields = [f for f in struct_fields(kind.wish) if f.name not in (*kind.internal, *kind.secret)]
    if update and kind.updatable:
        return [f for f in fields if f.name in kind.updatable]
    return [*fields, *(f for f in struct_fields(kind.status) if f.name in kind.settable_status)]


def fields_named(kind: Kind, names: Sequence[str]) -> list[FieldInfo]:
    """Of both halves."""
    return [f for f in (*struct_fields(kind.wish), *struct_fields(kind.status)) if f.name in names]


def options_for(fields: Iterable[FieldInfo]) -> list[click.Parameter]:
    return [option_for(field.name, field.type) for field in fields]


def option_for(name: str, wanted: Any) -> click.Option:
    """Text and numbers as they are, a switch for a boolean, a list of text one by one, JSON for the rest."""
    option = _option(name, wanted)
    option.hidden = name in REFUSED
    return option


def _option(name: str, wanted: Any) -> click.Option:
    flag = f"--{name.replace('_', '-')}"
    wanted, about = _plain(wanted), FIELDS.get(name)
    if wanted is bool:
        return click.Option([f"{flag}/--no-{flag[2:]}", name], default=None, help=about)
    if wanted in (int, float):
        return click.Option([flag, name], type=wanted, metavar="NUMBER", help=about)
    if get_origin(wanted) is Literal:
        choices = [str(choice) for choice in get_args(wanted)]
        metavar = None if len(choices) <= CHOICES_SHOWN else "WORD"
        about = " ".join([*filter(None, [about]), f"One of {', '.join(choices)}."]) if metavar else about
        return click.Option([flag, name], type=click.Choice(choices), metavar=metavar, help=about)
    if get_origin(wanted) is list and _plain(*get_args(wanted)) is str:
        return click.Option([flag, name], multiple=True, metavar="TEXT", help=about or "May be given several times.")
    if wanted is str and name in NAMED:
        return click.Option([flag, name], metavar="NAME", help=about, shell_complete=complete_names(NAMED[name]))
    if wanted is str:
        return click.Option([flag, name], metavar="TEXT", help=about)
    return click.Option([flag, name], type=structure, metavar="JSON", help=about)


def _plain(wanted: Any) -> Any:
    """The type without what limits it and without None."""
    if get_origin(wanted) is Annotated:
        return _plain(get_args(wanted)[0])
    if get_origin(wanted) in (Union, UnionType):
        rest = [part for part in get_args(wanted) if part is not NoneType]
        return _plain(rest[0]) if len(rest) == 1 else wanted
    return wanted


# --- the body ------------------------------------------------------------------------------------------------------


def input_options(command: F) -> F:
    file = click.option("--input-file", metavar="FILE", help="JSON or YAML with the fields; '-' is standard input.")
    data = click.option("--input-data", type=structure, metavar="JSON", help="The fields as JSON. Flags win over it.")
    return file(data(command))


def body_of(given: dict[str, Any]) -> dict[str, Any]:
    """What was given: the fields of `--input-file`, over them those of `--input-data`, over them single options.

    Takes both out of `given`. Raises UsageError for input that is not an object.
    """
    body: dict[str, Any] = {}
    for flag, value in (("--input-file", _read(given.pop("input_file"))), ("--input-data", given.pop("input_data"))):
        if value is not None and not isinstance(value, dict):
            raise click.BadParameter("this is not an object.", param_hint=f"'{flag}'")
        body |= value or {}
    if str(given.get("fileset")).startswith(("/", "./", "../", "~")):
        _refuse_path(given["fileset"])
    return body | {name: _list(value) for name, value in given.items() if value is not None and value != ()}


def _refuse_path(path: str) -> None:
    """Raises BadParameter with what makes a fileset of it."""
    directory = path.rstrip("/") + "/"
    raise click.BadParameter(
        f"'{path}' is a path; a fileset is needed. Make one of its files: nimhost files upload {directory}",
        param_hint="'--fileset'",
    )


def _list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _read(path: str | None) -> Any:
    if path is None:
        return None
    try:
        return read_structure(read_text(path))
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="'--input-file'") from None


def read_text(path: str) -> str:
    """The content of a file, or of standard input for '-'. Raises UsageError when it cannot be read."""
    try:
        return read_input() if path == "-" else Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise click.UsageError(f"Cannot read {path}: {error}") from None


def complete_body(given: dict[str, Any], fields: Sequence[FieldInfo]) -> dict[str, Any]:
    """The body of a create, with its `name`. Raises UsageError naming what is needed and not there."""
    name = take_name(given)
    body = {f.name: DEFAULTS[f.name] for f in fields if f.required and f.name in DEFAULTS}
    body |= body_of(given) | ({"name": name} if name else {})
    missing = [] if body.get("name") else ["NAME"]
    missing += [f"--{f.name.replace('_', '-')}" for f in fields if f.required and body.get(f.name) is None]
    if missing:
        raise click.UsageError(f"Missing: {', '.join(missing)}.")
    return body


# --- names and secrets ---------------------------------------------------------------------------------------------


def name_params(*kinds: str) -> list[click.Parameter]:
    """A name that may be given in its place or with `--name`; `kinds`: of these there are some already."""
    return [
        click.Argument(["name"], required=False, metavar="NAME", shell_complete=complete_names(*kinds)),
        click.Option(["--name", "other_name"], hidden=True),
    ]


def take_name(given: dict[str, Any]) -> str | None:
    """The name, in its place or with `--name`. Taken out of `given`. Raises UsageError for two different ones."""
    found = {text for text in (given.pop("name"), given.pop("other_name")) if text is not None}
    if len(found) > 1:
        raise click.UsageError(f"The name is given twice: {' and '.join(sorted(found))}.")
    return found.pop() if found else None


def need_name(given: dict[str, Any]) -> str:
    name = take_name(given)
    if name is None:
        raise click.UsageError("Missing: NAME.")
    return name


SECRET_OPTIONS: list[click.Parameter] = [
    click.Option(["--from-file"], metavar="FILE", help="Read the value from there; '-' asks for it, or reads a pipe."),
    click.Option(["--value"], metavar="TEXT", help="The value itself; others can see it while the command runs."),
]


def take_secret(given: dict[str, Any], required: bool) -> None:
    """The value of a secret, without white space around it, as `value`. Raises UsageError for an empty one."""
    path, value = given.pop("from_file"), given.pop("value")
    if path is not None and value is not None:
        raise click.UsageError("The value is given twice: with --from-file and with --value.")
    text = value if path is None else read_secret("Value") if path == "-" else read_text(path)
    if text is None:
        if required:
            raise click.UsageError("Missing: --from-file FILE, or --value TEXT.")
        return
    if not text.strip():
        raise click.UsageError("The value is empty.")
    given["value"] = text.strip()
