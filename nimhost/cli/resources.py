"""The commands of resources, generated from KINDS: create, get, list, update and delete of each kind.

What is more than that (`secrets access`, `files upload`, `inference gateway`, …) is added by the modules of MORE.
"""

from __future__ import annotations

import functools
import importlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import click

from nimhost.cli.examples import add_examples
from nimhost.cli.options import (
    address_options,
    complete_names,
    format_option,
    open_client,
    output_format,
    table_options,
)
from nimhost.cli.output import FORMATS, print_value
from nimhost.cli.resources_options import (
    SECRET_OPTIONS,
    body_of,
    complete_body,
    input_options,
    name_params,
    options_for,
    take_secret,
    wish_fields,
)
from nimhost.cli.resources_output import DELETED, print_entity, print_list, tell_adapter
from nimhost.errors import AlreadyExists
from nimhost.kinds import KINDS, Kind

if TYPE_CHECKING:
    from nimhost.client import Client

MORE = {
    "secrets": "nimhost.cli.resources_more",
    "models": "nimhost.cli.resources_more",
    "files": "nimhost.cli.resources_files",
    "inference": "nimhost.cli.resources_inference",
}
"""Modules that add to a group: each has `extend(root)`."""
_OPENAI = "--host-url https://api.openai.com/v1 --api-key-secret-name openai-api-key"
ABOUT: dict[str, tuple[str, *tuple[str, ...]]] = {
    "workspaces": ("Names are unique within each of them.", "workspaces create team"),
    "projects": ("Labels to group things by.", "projects create demo"),
    "secrets": (
        "Keys and tokens, kept encrypted; only 'access' shows them.",
        "secrets create openai-api-key --from-file -",
    ),
    "files": ("Filesets, and the files in them.", "files upload ./my-lora/"),
    "files filesets": ("Named sets of files. Uploaded, in a directory here, or in a repository of a hub.",),
    "models": ("What deployments run and requests name.", "models create qwen3 --fileset default/qwen3"),
    "adapters": (
        "LoRA adapters on top of a model: loaded into its engines while they run, and asked by their own name.",
        "deploy Qwen/Qwen3-1.7B --lora",
        "files upload ./math-lora/",
        "adapters create math --model qwen-qwen3-1-7b --fileset math-lora",
        'chat math "What is 2 + 3?"',
    ),
    "inference": (
        "Deployments, their configs, providers, and requests to them.",
        f"inference providers create openai {_OPENAI}",
    ),
    "inference deployment-configs": ("What deployments run. A model, its engine, image and GPUs.",),
    "inference deployments": ("Configs that are to run. To make one, with all that it needs: nimhost deploy",),
    "inference providers": (
        "Where models can be asked. The engines of deployments, and the services of others. NVIDIA's is there from the "
        "start, and wants a key: nimhost secrets create ngc-api-key --from-file - --workspace system",
        "secrets create openai-api-key --from-file -",
        f"inference providers create openai {_OPENAI}",
        'chat gpt-4 "Hello!" --provider openai',
        "secrets create anthropic --from-file -",
        "inference providers create anthropic --host-url https://api.anthropic.com --api-key-secret-name anthropic \\\n"
        "    --auth-header-format 'X-Api-Key: {{ auth_secret }}' \\\n"
        """    --default-extra-headers '{"anthropic-version": "2023-06-01"}'""",
    ),
    "inference virtual-models": ("Other names for models.",),
}
"""What a group is for, and examples."""
ONE = ("json", "yaml", "raw", "table")
"""Formats of one entity; as a table it has a row for each field."""
SWITCHES = {
    "models": ("verbose", "With everything that is known about them."),
    "deployments": ("all_versions", "Every version, not only the newest."),
    "virtual-models": ("exclude_autoprovisioned", "Only those that somebody made."),
}
"""A query parameter that is on or off, for lists of that kind."""


def group(word: str) -> click.Group:
    """`nimhost WORD`: a group with every kind whose place in the CLI begins with that word."""
    root = click.Group(word, help=_help(word))
    for kind in KINDS.values():
        first, *rest = kind.cli.split()
        if first == word:
            parent = root
            for part in rest:
                parent = subgroup(parent, part, _help(kind.cli))
            for command in commands(kind):
                parent.add_command(command)
    if word in MORE:
        importlib.import_module(MORE[word]).extend(root)
    add_examples(root, word)
    return root


def _help(path: str) -> str:
    about, *examples = ABOUT[path]
    title = "Example" if len(examples) == 1 else "Examples"
    return "\n  nimhost ".join([f"{about}\n\n\b\n{title}:" if examples else about, *examples])


def subgroup(parent: click.Group, name: str, about: str) -> click.Group:
    """The group of that name in `parent`, made where there is none."""
    found = parent.commands.get(name)
    if not isinstance(found, click.Group):
        found = click.Group(name, help=about)
        parent.add_command(found)
    return found


def commands(kind: Kind) -> Iterator[click.Command]:
    yield create_command(kind)
    yield get_command(kind)
    yield list_command(kind)
    yield update_command(kind, "update")
    if kind.update == "PATCH":  # the reference calls it so for some kinds
        yield update_command(kind, "patch", hidden=True)
    yield delete_command(kind)
    if kind.versioned:
        yield versions_group(kind)


def make(
    name: str,
    about: str,
    run: Callable[..., None],
    params: Sequence[click.Parameter],
    formats: tuple[str, ...] = ONE,
    hidden: bool = False,
    lists: bool = False,
) -> click.Command:
    """A command with the options that all of them have; `formats`: those its output can have, the first by default.
    `lists`: it is printed by `print_list`."""
    command = click.Command(name, callback=run, params=list(params), help=about, hidden=hidden)
    if formats:
        command = format_option(*formats, in_pipe="json" if lists else "")(command)
    if lists:
        command = table_options(command)
    return address_options(command)


def one(kind: Kind) -> str:
    word = kind.label.lower()
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def flag(name: str, about: str) -> click.Option:
    return click.Option([f"--{name.replace('_', '-')}", name], is_flag=True, help=about)


def existing(kind: Kind) -> click.Argument:
    """The name of one that there is; a shell can complete it."""
    return click.Argument(["name"], shell_complete=complete_names(kind.key))


def of(client: Client, kind: Kind) -> Any:
    """The client's resource of that kind."""
    return getattr(client, kind.key.replace("-", "_"))


# --- one of a kind -------------------------------------------------------------------------------------------------


def create_command(kind: Kind) -> click.Command:
    fields = wish_fields(kind)

    def run(exist_ok: bool, wait: bool = False, timeout_s: float = 0, poll_interval: None = None, **given: Any) -> None:
        if kind.secret:
            take_secret(given, required=given["input_file"] is None and given["input_data"] is None)
        body = complete_body(given, fields)
        with open_client() as client:
            resource = of(client, kind)
            made = create(kind.cli, resource.create, resource.get, body, exist_ok)
            print_entity(wait_for(client, made["name"], timeout_s) if wait else made)
        if kind.key == "adapters":
            tell_adapter(made)

    params = [*name_params(), *(SECRET_OPTIONS if kind.secret else []), *options_for(fields)]
    params.append(EXIST_OK)
    if kind.key == "deployments":
        params += WAIT_OPTIONS
    return input_options(make("create", f"Create {one(kind)}.", run, params))


EXIST_OK = flag("exist_ok", "If there is one of that name, show that one.")
WAIT_OPTIONS = [
    flag("wait", "Wait until it is ready or has failed."),
    click.Option(["--timeout", "timeout_s"], type=click.FloatRange(0), default=1200, metavar="SECONDS",
                 help="Wait no longer than this (exit 1)."),
    click.Option(["--poll-interval"], type=float, hidden=True),  # of the reference: taken, and without effect
]  # fmt: skip


def wait_for(client: Client, name: str, timeout_s: float) -> Any:
    """The deployment, once it is ready. What happens on the way is told beside the result."""
    from nimhost.cli.wait_inference import show

    return client.deployments.wait(name, timeout_s=timeout_s, on_entry=functools.partial(show, err=True))


def create(
    group: str, insert: Callable[..., Any], find: Callable[[str], Any], body: dict[str, Any], exist_ok: bool
) -> Any:
    """With `exist_ok` what is there already, whatever it is like. `group`: the words of its commands."""
    try:
        return insert(**body)
    except AlreadyExists as error:
        if exist_ok:
            return find(body["name"])
        name = body["name"]
        error.hint = error.hint or f"Change it: nimhost {group} update {name} …   Show it: nimhost {group} get {name}"
        raise


def get_command(kind: Kind) -> click.Command:
    def run(name: str, verbose: bool = False) -> None:
        with open_client() as client:
            print_entity(of(client, kind).get(name, **({"verbose": "true"} if verbose else {})))

    switches = [flag("verbose", "Everything that is known about it.")] if kind.key == "models" else []
    return make("get", f"Show {one(kind)}.", run, [existing(kind), *switches])


def update_command(kind: Kind, name: str, hidden: bool = False) -> click.Command:
    about = {
        "PATCH": "Change the fields that are given.",
        "PUT": "Replace it: a field that is not given gets its default.",
        "VERSION": "Make a new version of it: a field that is not given gets its default.",
    }

    def run(name: str, **given: Any) -> None:
        if kind.secret:
            take_secret(given, required=False)
        body = body_of(given)
        if not body:
            raise click.UsageError("Nothing to change is given.")
        with open_client() as client:
            print_entity(of(client, kind).update(name, **body))

    fields = options_for(wish_fields(kind, update=True))
    params = [existing(kind), *(SECRET_OPTIONS if kind.secret else []), *fields]
    return input_options(make(name, about[kind.update], run, params, hidden=hidden))


def delete_command(kind: Kind) -> click.Command:
    def run(name: str, dry_run: bool) -> None:
        with open_client() as client:
            found = of(client, kind).delete(name, dry_run=dry_run)
            left = adapters_of(client, "fileset", name) if kind.key == "filesets" else []
        if dry_run:
            print_deletion(found)
        else:
            click.echo(DELETED)
        if left:
            lose = "would lose" if dry_run else "have lost"
            click.echo(
                f"Adapters that {lose} their files: {', '.join(left)}.\n"
                "Give one others: nimhost adapters update NAME --fileset FILESET   "
                "or remove it: nimhost adapters delete NAME",
                err=True,
            )

    params = [existing(kind), flag("dry_run", "Only show what would be deleted, all that goes along included.")]
    return make("delete", f"Delete {one(kind)}.", run, params, FORMATS)


def adapters_of(client: Client, field: Literal["fileset", "model"], name: str) -> list[str]:
    """The adapters whose files are in that fileset, or that are on that model, in whatever workspace they are."""
    ref = client.adapters.ref(name)
    return [
        f"{row['workspace']}/{row['name']}"
        for row in client.adapters.list(workspace="-")
        if client.adapters.ref(row[field], row["workspace"]) == ref
    ]


def print_deletion(found: Any) -> None:
    """What would be deleted, one to a line."""
    if (wanted := output_format(*FORMATS)) != "table":
        print_value(found, wanted)
        return
    for one in found["would_delete"]:
        ref = "/".join(part for part in (one["workspace"], one["name"]) if part)
        click.echo(f"Would delete: {KINDS[one['kind']].label.lower()} {ref}")


# --- lists ---------------------------------------------------------------------------------------------------------


def list_command(kind: Kind) -> click.Command:
    switch, switched = SWITCHES.get(kind.key, ("", ""))
    fields = ("name", "workspace", *kind.filterable) if kind.sort is not None else ()

    def run(all_pages: bool, **given: Any) -> None:
        query = {name: str(value) for name in ("page", "page_size", "sort") if (value := given.get(name)) is not None}
        query |= filter_query(given.get("filter", ()), {name: given[_filter_param(name)] for name in fields})
        if switch and given[switch]:
            query[switch] = "true"
        with open_client() as client:
            if all_pages:
                query.pop("page", None)
                rows = of(client, kind).list(**query)
                page = {"data": rows, "pagination": _one_page(len(rows))}
            else:
                page = of(client, kind).page(**query)
        print_list(kind.key, page, page["data"])

    params: list[click.Parameter] = [
        click.Option(["--page"], type=click.IntRange(1), metavar="NUMBER", help="Which page."),
        click.Option(["--page-size"], type=click.IntRange(1), metavar="NUMBER", help="How many on a page."),
        flag("all_pages", "All there are, as one page."),
    ]
    if kind.sort is not None:
        about = f"Only such: FIELD=VALUE or JSON. Fields: {', '.join(fields)}."
        params.append(click.Option(["--sort"], metavar="FIELD", help=f"{', '.join(kind.sortable)}; '-' for downwards."))
        params.append(click.Option(["--filter"], multiple=True, metavar="TEXT", help=about))
        params += [click.Option([f"--filter.{name.replace('_', '-')}", _filter_param(name)], hidden=True)
                   for name in fields]  # fmt: skip
    if switch:
        params.append(flag(switch, switched))
    return make("list", f"List {kind.label.lower()}s.", run, params, FORMATS, lists=True)


def _filter_param(field: str) -> str:
    return f"filter_{field}"


def filter_query(texts: Sequence[str], fields: dict[str, str | None]) -> dict[str, str]:
    """`--filter` as JSON or FIELD=VALUE, and `--filter.FIELD VALUE`, as query parameters."""
    query = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if text.lstrip().startswith("{"):
            try:
                query["filter"] = json.dumps(json.loads(text))
            except ValueError as error:
                raise click.BadParameter(f"this is not JSON: {error}", param_hint="'--filter'") from None
        elif equals and name.strip():
            query[f"filter[{name.strip()}]"] = value
        else:
            raise click.BadParameter("write FIELD=VALUE, or JSON.", param_hint="'--filter'")
    return query | {f"filter[{name}]": value for name, value in fields.items() if value is not None}


def _one_page(count: int) -> dict[str, int]:
    return {"page": 1, "page_size": count, "current_page_size": count, "total_pages": 1, "total_results": count}


# --- versions ------------------------------------------------------------------------------------------------------


def versions_group(kind: Kind) -> click.Group:
    """`versions list NAME`, and `get N`, `delete N` with the name as an option of the kind's own word."""
    word = kind.key.rpartition("-")[2].removesuffix("s")  # --config, --deployment
    owner = click.Option(
        [f"--{word}", "owner"], required=True, metavar="NAME", shell_complete=complete_names(kind.key),
        help="Whose version.",
    )  # fmt: skip

    def show_all(name: str) -> None:
        with open_client() as client:
            rows = of(client, kind).versions(name)
        print_list(kind.key, rows, rows)

    def show(version: int, owner: str) -> None:
        with open_client() as client:
            print_entity(of(client, kind).get_version(owner, version))

    def delete(version: int, owner: str) -> None:
        with open_client() as client:
            of(client, kind).delete_version(owner, version)
        click.echo(DELETED)

    number = click.Argument(["version"], type=click.IntRange(1))
    versions = click.Group("versions", help="Its versions, the newest first.")
    versions.add_command(make("list", "List them.", show_all, [existing(kind)], FORMATS, lists=True))
    versions.add_command(make("get", "Show one.", show, [number, owner]))
    versions.add_command(make("delete", "Delete one that is neither the newest nor used.", delete, [number, owner], ()))
    return versions
