"""What `nimhost inference` has beside its resources: requests through the gateway, served models, URLs, statuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from contextlib import closing
from typing import Any

import click

from nimhost.cli.options import complete_names, open_client, output_format
from nimhost.cli.output import FORMATS, print_value
from nimhost.cli.resources import existing, make, subgroup
from nimhost.cli.resources_options import (
    body_of,
    fields_named,
    input_options,
    name_params,
    need_name,
    options_for,
    structure,
)
from nimhost.cli.resources_output import print_entity, print_list
from nimhost.client.inference import gateway_path
from nimhost.client.streams import Part
from nimhost.client.wire import Request, segment
from nimhost.kinds import KINDS

VERBS = ("get", "post", "put", "patch", "delete")
BODIES = ("post", "put", "patch")


def extend(root: click.Group) -> None:
    root.add_command(get_url())
    models = subgroup(root, "models", "What can be asked right now, as OpenAI clients see it.")
    add_models(models)
    gateway = subgroup(root, "gateway", "Requests to models, as they are.")
    for route in ("provider", "model"):
        add_verbs(subgroup(gateway, route, f"To a {route}."), route)
    ready = make("ready", "Ask whether requests can be sent to it.", provider_ready, [existing(KINDS["providers"])])
    subgroup(gateway, "provider", "").add_command(ready)
    openai = subgroup(gateway, "openai", "To the model that the body names, as workspace/model.")
    add_verbs(openai, None)
    add_models(subgroup(subgroup(openai, "v1", "OpenAI's paths."), "models", "What can be asked right now."))
    subgroup(root, "providers", "").add_command(update_status("providers"))
    deployments = subgroup(root, "deployments", "")
    deployments.add_command(update_status("deployments"))
    deployments.add_command(make("list-models", "Show what it serves.", list_models, [existing(KINDS["deployments"])]))


# --- models and URLs -----------------------------------------------------------------------------------------------


def add_models(group: click.Group) -> None:
    group.add_command(make("list", "List them; their ids are workspace/name.", list_served, [], FORMATS, lists=True))
    group.add_command(make("get", "Show one.", get_served, [click.Argument(["name"])]))


def list_served() -> None:
    page = served()
    print_list("served", page, page["data"])


def get_served(name: str) -> None:
    print_entity(served(name))


def served(*name: str) -> Any:
    with open_client() as client:
        where = "/".join((gateway_path(client.workspace), "openai/-/v1/models", *map(segment, name)))
        return client.send(Request(path=where))


def list_models(name: str) -> None:
    with open_client() as client:
        print_entity(client.deployments.models(name))


def get_url() -> click.Command:
    def run(provider: str | None, virtual_model: str | None) -> None:
        if provider and virtual_model:
            raise click.UsageError("Give --provider or --virtual-model, not both.")
        with open_client() as client:
            workspace, route = client.workspace, "openai/-/v1"
            for word, resource, name in (
                ("provider", client.providers, provider), ("model", client.virtual_models, virtual_model)
            ):  # fmt: skip
                if name:
                    found = resource.get(name)
                    workspace, route = found["workspace"], f"{word}/{found['name']}/-"
            click.echo(f"{client.base_url}{gateway_path(workspace)}/{route}")

    about = "Print the address of the gateway for OpenAI clients, or of a provider or model."
    params = [
        click.Option([f"--{word}"], metavar="NAME", shell_complete=complete_names(f"{word}s"), help=f"Of this {what}.")
        for word, what in (("provider", "provider"), ("virtual-model", "model"))
    ]
    return make("get-url", about, run, params, ())


# --- the gateway ---------------------------------------------------------------------------------------------------


def add_verbs(group: click.Group, route: str | None) -> None:
    """A command for each HTTP method; `route`: `provider` or `model`, with a name, or None for the openai route."""
    for verb in VERBS:
        uri = click.Argument(["trailing_uri"], metavar="URI")
        body = click.Option(["--body"], type=structure, metavar="JSON", help="What to send.")
        params = [uri, *(name_params(f"{route}s") if route else []), *([body] if verb in BODIES else [])]
        about = f"{verb.upper()} a path of the engine's."
        command = make(verb, about, passing(verb, route), params)
        group.add_command(input_options(command) if verb in BODIES else command)


def passing(verb: str, route: str | None) -> Callable[..., None]:
    def run(trailing_uri: str, body: Any = None, **given: Any) -> None:
        where = f"{route}/{need_name(given)}" if route else "openai"
        if verb in BODIES:
            body = body_of({**given, "body": None}) if body is None else body
        with open_client() as client:
            parts = client.gateway(where, trailing_uri, method=verb.upper(), body=body)
            with closing(parts):
                show(parts)

    return run


def show(parts: Iterable[Part]) -> None:
    """JSON in the format asked for; anything else as it comes."""
    whole = b""
    for part in parts:
        if part.content_type.startswith("application/json"):
            whole += part.data
        else:
            sys.stdout.buffer.write(part.data)
            sys.stdout.flush()
    if whole:
        try:
            print_value(json.loads(whole), output_format("json", "yaml", "raw"))
        except ValueError:  # what an engine calls JSON need not be
            sys.stdout.buffer.write(whole)
            sys.stdout.flush()


def provider_ready(name: str) -> None:
    with open_client() as client:
        print_entity(client.providers.ready(name))


# --- statuses ------------------------------------------------------------------------------------------------------


def update_status(key: str) -> click.Command:
    """What the daemon finds out by itself; for tests and tools that know better."""
    names = {"providers": ("model_deployment_id", "served_models", "status", "status_message"),
             "deployments": ("model_provider_id", "status", "status_message")}[key]  # fmt: skip

    def run(name: str, **given: Any) -> None:
        body = body_of(given)
        if not body:
            raise click.UsageError("Nothing to change is given.")
        with open_client() as client:
            print_entity(getattr(client, key).update_status(name, **body))

    params = [existing(KINDS[key]), *options_for(fields_named(KINDS[key], names))]
    return input_options(make("update-status", "Set its status by hand.", run, params))
