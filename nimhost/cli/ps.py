"""`nimhost ps`"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

from nimhost.cli.options import address_options, format_option, open_client, output_format, retyped
from nimhost.cli.output import FORMATS, age, first_sentence, print_table, print_value
from nimhost.client.inference import lacks_key
from nimhost.client.resources import last_probe
from nimhost.errors import NotFound

if TYPE_CHECKING:
    from nimhost.client import Client

HEADERS = ("NAME", "MODEL", "ENGINE", "GPUS", "STATUS", "AGE", "MESSAGE")
LAST_PROBE = " Last probe: "
Rows = list[dict[str, Any]]


@click.command()
@click.option("-a", "--all", "everywhere", is_flag=True, help="In all workspaces.")
@format_option(*FORMATS)
@address_options
def ps(everywhere: bool) -> None:
    """List deployments, and providers that are not a deployment's own.

    \b
    Examples:
      nimhost ps
      nimhost ps -f json | jq '.[] | select(.status == "READY") | .name'
    """
    with open_client() as client:
        where = "-" if everywhere else None
        deployments = client.deployments.list(workspace=where)
        configs = client.deployment_configs.list(workspace=where)
        configs += [old for deployment in deployments if (old := _served(client, deployment)) is not None]
        providers = client.providers.list(workspace=where)
    rows = describe(deployments, configs, providers, everywhere)
    wanted = output_format(*FORMATS)
    if wanted != "table":
        print_value(rows, wanted)
    elif rows:
        print_table(HEADERS, [_cells(row) for row in rows])
    else:
        click.echo(retyped("Nothing is deployed. Try: nimhost deploy Qwen/Qwen3-1.7B"))


def describe(
    deployments: Iterable[Any], configs: Iterable[Any], providers: Iterable[Any], everywhere: bool = False
) -> Rows:
    """One row for each deployment and each provider of its own right, with what the table and `-f json` show."""
    by_version = {(config["workspace"], config["name"], config.get("entity_version")): config for config in configs}
    by_ref = {(place, name): config for (place, name, _), config in reversed(by_version.items())}
    rows = []
    for deployment in deployments:
        config = by_version.get((*config_ref(deployment), _config_version(deployment)))
        rows.append(_deployment(deployment, config or by_ref.get(config_ref(deployment)), everywhere))
    owned = {f"{d['workspace']}/{d['name']}" for d in deployments}
    rows += [_provider(p, everywhere) for p in providers if p.get("model_deployment_id") not in owned]
    return rows


def _served(client: Client, deployment: Any) -> Any:
    """The config of a version that serves though another one is wished: while an update rolls, or after it failed."""
    version = _config_version(deployment)
    if version in (None, deployment.get("config_version")):
        return None
    place, name = config_ref(deployment)
    with contextlib.suppress(NotFound):  # that version has been deleted: the one that is wished has to do
        return client.deployment_configs.get_version(name, version, workspace=place)
    return None


def _config_version(deployment: Any) -> int | None:
    serving = deployment.get("serving") or {}
    return serving.get("config_version")


def config_ref(deployment: Any) -> tuple[str, str]:
    place, slash, name = deployment["config"].partition("/")
    return (place, name) if slash else (deployment["workspace"], place)


def _deployment(deployment: Any, config: Any, everywhere: bool) -> dict[str, Any]:
    executor = config["executor_config"] if config else {}
    stopped = deployment.get("desired") == "stopped"
    probe = last_probe(deployment)
    return {
        "name": _name(deployment, everywhere),
        "workspace": deployment["workspace"],
        "model": _model(config) if config else None,
        "engine": config["engine"] if config else None,
        "gpus": executor.get("gpu"),
        "status": "STOPPED" if stopped and deployment["status"] == "PENDING" else deployment["status"],
        "created_at": deployment["created_at"],
        "message": deployment["status_message"] + (f"{LAST_PROBE}{probe}." if probe else ""),
    }


def _model(config: Any) -> str | None:
    """The model entity where there is one, else the label or the image."""
    spec, executor = config["model_spec"], config["executor_config"]
    named = "/".join(part for part in (spec.get("model_namespace"), spec.get("model_name")) if part)
    return config.get("model_entity_id") or named or executor.get("image_name")


def _provider(provider: Any, everywhere: bool) -> dict[str, Any]:
    served = provider.get("served_models") or []
    return {
        "name": _name(provider, everywhere),
        "workspace": provider["workspace"],
        "model": served[0]["served_model_name"] if len(served) == 1 else f"{len(served)} models",
        "engine": "provider",
        "gpus": None,
        "status": "NO KEY" if lacks_key(provider) else provider.get("status"),
        "created_at": provider["created_at"],
        "message": provider.get("status_message") or provider["host_url"],
    }


def _name(entity: Any, everywhere: bool) -> str:
    return f"{entity['workspace']}/{entity['name']}" if everywhere else entity["name"]


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    gpus = "-" if row["gpus"] is None else str(row["gpus"])
    said, mark, probe = row["message"].partition(LAST_PROBE)  # which is said last, and is what is new
    message = first_sentence(said) + mark + probe
    columns = (row["name"], row["model"], row["engine"], gpus, row["status"], age(row["created_at"]), message)
    return tuple("-" if cell is None else str(cell) for cell in columns)
