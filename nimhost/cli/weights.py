"""`nimhost weights`"""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from nimhost.cli.model_options import in_flags
from nimhost.cli.options import address_options, complete_names, format_option, open_client, output_format, settings
from nimhost.cli.output import FORMATS, age, print_table, print_value
from nimhost.cli.stages import Stage, View, clock, size_text
from nimhost.client.wire import Request
from nimhost.errors import BadRequest, UpstreamError, WeightsCorrupt, from_reply

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from nimhost.cli.options import F
    from nimhost.client import Client

PATH = "/apis/nimhost/v1/weights"
HEADERS = ("WEIGHTS", "COMMIT", "SIZE", "STATE", "LAST USED", "FETCHED BY", "USED BY")
NGC = "ngc://"
_AGAIN = {
    "pull": "Once nimhost runs again, the download goes on where it stopped; to follow it, run this again.",
    "verify": "Once nimhost runs again, run this again.",
}
UNITS_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}


@click.group()
def weights() -> None:
    """The weights on this machine: what there is and who uses it, fetch ahead, verify, make room.

    They lie in one cache in the layout of Hugging Face's tools, which use it too. REPO is a repository of the model
    hub (Qwen/Qwen3-1.7B, or with a revision: Qwen/Qwen3-1.7B@main) or a model of NGC (ngc://ORG/TEAM/NAME:VERSION).

    \b
    Examples:
      nimhost weights list
      nimhost weights pull Qwen/Qwen3-1.7B
      nimhost weights prune --unused-for 30d
    """


def complete_repo(ctx: click.Context, param: click.Parameter, incomplete: str) -> Sequence[CompletionItem]:
    """Repositories in the cache, for the shell; none when the daemon does not answer at once."""
    from click.shell_completion import CompletionItem

    from nimhost.cli.options import COMPLETION_TIMEOUT_S
    from nimhost.errors import NimhostError

    try:
        with ctx, open_client(timeout_s=COMPLETION_TIMEOUT_S) as client:
            rows = client.send(Request(path=PATH))["data"]
    except NimhostError:
        return []
    return [CompletionItem(name) for name in sorted({row["repo"] for row in rows}) if name.startswith(incomplete)]


def repo_argument(command: F) -> F:
    return click.argument("repo", metavar="REPO", shell_complete=complete_repo)(command)


def kind_option(command: F) -> F:
    kinds = click.Choice(["model", "dataset", "space", "resource"])
    return click.option("--type", "repo_type", type=kinds, default="model", show_default=True, help="What it is.")(
        command
    )


def named(repo: str, repo_type: str) -> dict[str, Any]:
    """The body that names it. Raises BadRequest."""
    if repo.startswith(NGC):
        name, _, version = repo.removeprefix(NGC).partition(":")
        return {"repo_id": name, "revision": version or None, "repo_type": repo_type, "registry": "ngc"}
    repo_id, at, revision = repo.partition("@")
    if not repo_id or (at and not revision):
        raise BadRequest(
            f"'{repo}' is not a repository.", "Write OWNER/NAME, OWNER/NAME@REVISION or ngc://ORG/TEAM/NAME:V"
        )
    return {"repo_id": repo_id, "revision": revision or None, "repo_type": repo_type}


# --- list ----------------------------------------------------------------------------------------------------------


@weights.command("list")
@format_option(*FORMATS)
@address_options
def list_() -> None:
    """List the weights on this machine, how large they are, and who uses them.

    STATE is complete, partial (a download broke off, or was of some files only), damaged (see: nimhost weights verify)
    or fetching. What was fetched by other tools is theirs: nimhost uses it and never removes it.

    \b
    Examples:
      nimhost weights list
      nimhost weights list -f json | jq '.[] | select(.deployments == []) | .repo'
    """
    with open_client() as client:
        rows = client.send(Request(path=PATH))["data"]
    wanted = output_format(*FORMATS)
    if wanted != "table":
        print_value(rows, wanted)
    elif rows:
        print_table(HEADERS, [_cells(row) for row in rows])
        click.echo(f"\n{size_text(sum(row['own_bytes'] for row in rows))} in all.")
    else:
        click.echo("There are no weights here yet. Fetch some with: nimhost weights pull Qwen/Qwen3-1.7B")


def _cells(row: Any) -> tuple[str, ...]:
    names = [name for name in row["names"] if name != row["commit"]]
    commit = row["commit"][:12] + (f" ({', '.join(names)})" if names else "") if row["commit"] else "-"
    users = [*row["deployments"], *(f"fileset {ref}" for ref in row["filesets"])]
    return (
        row["repo"], commit, size_text(row["size_bytes"]), _state(row["state"], row["progress"]),
        age(_iso(row["used_at"])),
        "nimhost" if row["fetched_by_nimhost"] else "others", ", ".join(users) or "-",
    )  # fmt: skip


def _state(state: str, progress: Any) -> str:
    """`fetching 43%, 20 MB/s, 0:32 left`, or what it waits for."""
    if not progress:
        return state
    total = progress["total_bytes"]
    parts = [f"{state} {progress['done_bytes'] / total:.0%}" if total else state]
    if progress["eta_s"] is not None:
        parts += [f"{size_text(progress['rate_bytes_s'])}/s", f"{clock(progress['eta_s'])} left"]
    return ", ".join([*parts, progress["message"]] if progress["message"] else parts)


# --- pull ----------------------------------------------------------------------------------------------------------


@weights.command()
@repo_argument
@click.option(
    "--secret", metavar="SECRET", shell_complete=complete_names("secrets"),
    help="Secret with the token (or NGC key) that opens it.  [default for NGC: system/ngc-api-key]",
)  # fmt: skip
@click.option("--allow", multiple=True, metavar="PATTERN", help="Only files that match, e.g. '*.json'. Repeatable.")
@click.option("--ignore", multiple=True, metavar="PATTERN", help="No files that match. Repeatable.")
@click.option("--stop", is_flag=True, help="End such a pull; what has arrived stays.")
@kind_option
@format_option(*FORMATS)
@address_options
def pull(
    repo: str, secret: str | None, allow: tuple[str, ...], ignore: tuple[str, ...], stop: bool, repo_type: str
) -> None:
    """Fetch weights ahead: a deployment of them then starts at once.

    The daemon fetches: Ctrl-C ends the watching, not the download, and after a restart it goes on by itself where it
    stopped. Of a model, what no engine reads is left out (the same weights in another format, pictures); with --allow
    or --ignore still more is, and the rest comes when it is deployed.

    \b
    Examples:
      nimhost weights pull Qwen/Qwen3-1.7B
      nimhost weights pull meta-llama/Llama-3.2-1B@main --secret hf-token
      nimhost weights pull ngc://nvidia/nemo/megatron_gpt_345m:1
      nimhost weights pull Qwen/Qwen3-1.7B --allow '*.json'
      nimhost weights pull Qwen/Qwen3-1.7B --stop
    """
    body = named(repo, repo_type)
    with open_client() as client:
        if stop:
            client.send(Request(method="POST", path=f"{PATH}/stop", body=body))
            click.echo(
                f"{repo} is not pulled any more. What has arrived stays; go on with: nimhost weights pull {repo}"
            )
            return
        body |= {"secret": secret, "workspace": settings().workspace, "allow": list(allow), "ignore": list(ignore)}
        began = time.monotonic()
        try:
            found = _follow(client, "pull", body, "weights")
        except KeyboardInterrupt:
            click.echo(
                f"\nThe download of {repo} goes on in the daemon.\n  see it:  nimhost weights list\n"
                f"  follow:  nimhost weights pull {repo}\n  stop:    nimhost weights pull {repo} --stop",
                err=True,
            )
            raise click.exceptions.Exit(130) from None
    took = clock(time.monotonic() - began)
    what = f"What you chose of {repo}" if allow or ignore else repo
    _show(found, lambda: f"{what} is here after {took}: {size_text(found['size_bytes'])}\n  {found['path']}")


# --- verify --------------------------------------------------------------------------------------------------------


@weights.command()
@repo_argument
@kind_option
@format_option(*FORMATS)
@address_options
def verify(repo: str, repo_type: str) -> None:
    """Read weights anew and compare every file with the hash that was promised for it (exit 1 if one differs).

    A damaged file is not served any more; the next fetch brings it again, and only it.

    \b
    Examples:
      nimhost weights verify Qwen/Qwen3-1.7B
      nimhost weights verify Qwen/Qwen3-1.7B@main -f json | jq .damaged
    """
    with open_client() as client:
        found = _follow(client, "verify", named(repo, repo_type), "verifying")
    if not found["damaged"]:
        unknown = sum(file["verdict"] == "unknown" for file in found["files"])
        open_question = f" For {unknown} of them no hash is known: their sizes are." if unknown else ""
        _show(found, lambda: f"{repo}: all {len(found['files'])} files are what was promised.{open_question}")
        return
    _show(
        found,
        lambda: "\n".join(
            f"{file['path']}: {_WORDS[file['verdict']]}" for file in found["files"] if file["path"] in found["damaged"]
        ),
    )
    raise WeightsCorrupt(
        f"{repo}: {len(found['damaged'])} of {len(found['files'])} files {_are(len(found['damaged']))} damaged.",
        f"Fetch them anew: {found['heal']}",
    )


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


_WORDS = {"hash": "its content is not what was promised", "size": "it has another size", "missing": "it is not there"}


# --- prune ---------------------------------------------------------------------------------------------------------


def _span(ctx: click.Context, param: click.Parameter, text: str | None) -> float:
    """`30d`, `12h`, `90m` in seconds."""
    if text is None:
        return 0.0
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhdw])", text)
    if match is None:
        raise click.BadParameter(f"'{text}' is not a time. Write it as 12h, 30d or 4w.")
    return float(match[1]) * UNITS_S[match[2]]


@weights.command()
@click.option(
    "--unused-for", "unused_for_s", metavar="TIME", callback=_span, help="Only what was not used for so long, e.g. 30d."
)
@click.option("--dry-run", is_flag=True, help="Say what would go, and what stays and why.")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@format_option(*FORMATS)
@address_options
def prune(unused_for_s: float, dry_run: bool, yes: bool) -> None:
    """Remove weights that nimhost fetched and that no deployment and no fileset needs.

    What other tools fetched stays, and so do files that other snapshots share. Left-overs of broken-off downloads go
    as well.

    \b
    Examples:
      nimhost weights prune --dry-run
      nimhost weights prune --unused-for 30d
      nimhost weights prune --yes
    """
    wanted = output_format(*FORMATS)
    if not (dry_run or yes) and wanted != "table":
        raise click.UsageError(f"Nobody is asked where {wanted} is printed: give --yes, or --dry-run.")
    with open_client() as client:
        found = _prune(client, unused_for_s, dry_run=True)
        if not dry_run and found["data"]:
            if not yes:
                _print_pruned(found, sys.stderr)
                if not _agreed(f"Remove them, {size_text(found['freed_bytes'])} in all?"):
                    click.echo("Nothing was removed.", err=True)
                    raise click.exceptions.Exit(1)
            found = _prune(client, unused_for_s, dry_run=False)
    if wanted != "table":
        print_value(found, wanted)
        return
    if dry_run:
        _print_pruned(found, sys.stdout)
        for row in found["kept"]:
            click.echo(f"keep    {size_text(row['own_bytes']):>8}  {_name(row)}: {row['why']}")
    elif yes:
        _print_pruned(found, sys.stdout, "removed")
    verb = "This would free" if dry_run else "Freed"
    click.echo(f"{verb} {size_text(found['freed_bytes'])}." if found["data"] else _nothing(found))


def _agreed(question: str) -> bool:
    """Raises UsageError where nobody answers."""
    try:
        return click.confirm(question, err=True)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        raise click.UsageError("Nobody is there to ask: give --yes, or --dry-run.") from None


def _prune(client: Client, unused_for_s: float, *, dry_run: bool) -> Any:
    body = {"unused_for_s": unused_for_s, "dry_run": dry_run}
    return client.send(Request(method="POST", path=f"{PATH}/prune", body=body))


def _print_pruned(found: Any, file: Any, verb: str = "remove ") -> None:
    for row in found["data"]:
        click.echo(f"{verb} {size_text(row['freed_bytes']):>8}  {_name(row)}", file=file)


def _nothing(found: Any) -> str:
    more = "" if not found["kept"] else f" What stays ({len(found['kept'])}), and why: nimhost weights prune --dry-run"
    return f"There is nothing to remove.{more}"


def _name(row: Any) -> str:
    return f"{row['repo']}@{row['commit'][:12]}" if row["commit"] else f"{row['repo']} (left of a download)"


# --- following -----------------------------------------------------------------------------------------------------


def _follow(client: Client, verb: str, body: dict[str, Any], label: str) -> Any:
    """What became of it; its progress is shown meanwhile. Raises the error that it ended in."""
    from nimhost.cli.progress import live, plain

    report = sys.stdout if output_format(*FORMATS) == "table" else sys.stderr
    began = time.monotonic()
    with live(report) if report.isatty() else plain(report) as show:
        for step in _steps(client, verb, body):
            if step["status"] == "failed":
                hint = step["hint"] and in_flags(step["hint"], f"nimhost weights pull {body['repo_id']} --secret")
                raise from_reply(500, step["error"], step["message"], hint)
            if step["status"] == "done":
                return step
            stage = Stage(
                name=label, message=step.get("message") or "", done_bytes=step["done_bytes"],
                total_bytes=step["total_bytes"], rate_bytes_s=step.get("rate_bytes_s") or 0.0, started_at=began,
            )  # fmt: skip
            show(View(status="", stages=(stage,)))
    raise UpstreamError("nimhost went away meanwhile.", _AGAIN[verb])


def _steps(client: Client, verb: str, body: dict[str, Any]) -> Iterator[Any]:
    from nimhost.client.streams import Records

    asked = Request(method="POST", path=f"{PATH}/{verb}", body=body, quiet_s=math.inf)
    stream: Any = client.stream(asked, Records)
    begun = False
    try:
        with closing(stream) as records:
            for step in records:
                begun = True
                yield step
    except UpstreamError as error:
        if not begun:
            raise
        raise UpstreamError(error.message, _AGAIN[verb]) from error


def _show(found: Any, text: Callable[[], str]) -> None:
    wanted = output_format(*FORMATS)
    if wanted == "table":
        click.echo(text())
    else:
        print_value({key: value for key, value in found.items() if key != "status"}, wanted)


def _iso(seconds: float) -> str:
    from datetime import UTC, datetime

    return datetime.fromtimestamp(seconds, UTC).isoformat()
