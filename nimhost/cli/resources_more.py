"""What `nimhost secrets` and `nimhost models` have beside the commands that every kind has."""

from __future__ import annotations

import functools
from typing import Any

import click

from nimhost.cli.options import complete_names, open_client
from nimhost.cli.resources import EXIST_OK, create, existing, make, subgroup
from nimhost.cli.resources_options import body_of, complete_body, input_options, name_params, options_for, wish_fields
from nimhost.cli.resources_output import DELETED, print_entity, tell_adapter
from nimhost.kinds import KINDS


def extend(root: click.Group) -> None:
    if root.name == "secrets":
        root.add_command(make("access", "Show a secret with its value.", access, [existing(KINDS["secrets"])]))
        admin = subgroup(root, "admin", "For the administrator.")
        admin.add_command(make("rotate-encryption-keys", "Encrypt all secrets anew.", rotate, []))
    else:
        adapters = subgroup(root, "adapters", "LoRA adapters of a model.")
        for command in (create_adapter(), update_adapter(), delete_adapter()):
            adapters.add_command(command)


def access(name: str) -> None:
    with open_client() as client:
        print_entity(client.secrets.access(name))


def rotate() -> None:
    with open_client() as client:
        print_entity(client.secrets.rotate())


def create_adapter() -> click.Command:
    fields = [field for field in wish_fields(KINDS["adapters"]) if field.name != "model"]

    def run(model: str, exist_ok: bool, **given: Any) -> None:
        body = complete_body(given, fields)
        with open_client() as client:
            insert = functools.partial(client.models.create_adapter, model)
            made = create("adapters", insert, client.adapters.get, body, exist_ok)
        print_entity(made)
        tell_adapter(made)

    model = click.Argument(["model"], shell_complete=complete_names("models"))
    params = [model, *name_params(), *options_for(fields), EXIST_OK]
    return input_options(make("create", "Put an adapter on a model.", run, params))


def update_adapter() -> click.Command:
    def run(adapter: str, model_name: str, **given: Any) -> None:
        body = body_of(given)
        if not body:
            raise click.UsageError("Nothing to change is given.")
        with open_client() as client:
            print_entity(client.models.update_adapter(model_name, adapter, **body))

    fields = options_for(wish_fields(KINDS["adapters"], update=True))
    params = [ADAPTER, MODEL_NAME, *fields]
    return input_options(make("update", "Change the fields that are given.", run, params))


def delete_adapter() -> click.Command:
    def run(adapter: str, model_name: str) -> None:
        with open_client() as client:
            client.models.delete_adapter(model_name, adapter)
        click.echo(DELETED)

    return make("delete", "Take an adapter off a model.", run, [ADAPTER, MODEL_NAME], ())


ADAPTER = click.Argument(["adapter"], shell_complete=complete_names("adapters"))
MODEL_NAME = click.Option(
    ["--model-name"], required=True, metavar="NAME", help="The model it belongs to.",
    shell_complete=complete_names("models"),
)  # fmt: skip
