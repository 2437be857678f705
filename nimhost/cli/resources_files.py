"""`nimhost files`: upload, download, list and delete files of a fileset."""

from __future__ import annotations

import os
import shlex
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import click

from nimhost.cli.options import complete_names, open_client
from nimhost.cli.output import FORMATS, clean
from nimhost.cli.resources import make
from nimhost.cli.resources_output import DELETED, print_list
from nimhost.errors import AlreadyExists, BadRequest, NotFound
from nimhost.refs import is_name, slug

if TYPE_CHECKING:
    from nimhost.client import Client

SHOWN_FROM_BYTES = 8_000_000


def extend(root: click.Group) -> None:
    fileset = click.Argument(["fileset"], shell_complete=complete_names("filesets"))
    place = click.Option(["--remote-path"], default="", metavar="PATH", help="In the fileset; without it: the root.")
    exact = click.Option(["--remote-path"], required=True, metavar="PATH", help="The file to delete.")
    local = click.Argument(["local_path"], type=click.Path(exists=True))
    output = click.Option(["-o", "--output"], required=True, metavar="DIRECTORY", help="Where to put them.")
    optional = click.Argument(["fileset"], required=False, shell_complete=complete_names("filesets"))
    root.add_command(make("upload", UPLOAD, upload, [local, optional, place], ()))
    root.add_command(make("download", "Copy files of a fileset to a directory here.", download,
                          [fileset, place, output], ()))  # fmt: skip
    root.add_command(make("list", "List the files of a fileset.", list_files, [fileset, place], FORMATS,
                          lists=True))  # fmt: skip
    root.add_command(make("delete", "Delete a file of a fileset.", delete, [fileset, exact], ()))


UPLOAD = """Copy a file or a directory into a fileset.

Of a directory its contents are copied if it is written with a slash at the end, else the directory itself. Without
FILESET a new one is made, named after what is uploaded; else it is one that there is (make one with: nimhost files
filesets create NAME).

\b
Examples:
  nimhost files upload ./my-lora/
  nimhost files filesets create my-tool-plugin && nimhost files upload my_parser.py my-tool-plugin
"""


def upload(local_path: str, fileset: str | None, remote_path: str) -> None:
    files = [(source, path, size_of(source)) for source, path in uploads(local_path, remote_path)]
    if not files:
        raise click.UsageError(f"There is no file in {local_path}.")
    with open_client() as client:
        target = find_fileset(client, fileset) if fileset else new_fileset(client, local_path)
        for source, path, size_bytes in files:
            with progress(path, size_bytes) as show:
                client.filesets.upload(target, path, str(source), on_sent=show)
            click.echo(path)
    click.echo(f"Completed upload to {target}" + (f"#{remote_path}" if remote_path else ""))


def uploads(local_path: str, remote_path: str) -> Iterator[tuple[Path, str]]:
    """Each local file, and its path in the fileset. Raises BadRequest for a directory that cannot be read."""
    source, into = Path(local_path), PurePosixPath(remote_path)
    if not source.is_dir():
        yield source, str(into / source.name if remote_path.endswith("/") or not remote_path else into)
        return
    if not local_path.endswith("/"):
        into /= source.resolve().name
    for folder, folders, files in os.walk(source, onerror=_refuse):
        folders.sort()
        for link in [link for name in folders if (link := Path(folder, name)).is_symlink()]:
            click.echo(f"Left out, as a link to a directory: {link}", err=True)
        for name in sorted(files):
            path = Path(folder, name)
            yield path, str(into / path.relative_to(source).as_posix())


def _refuse(error: OSError) -> None:
    raise BadRequest(f"Cannot read {error.filename}: {error.strerror}")


def size_of(file: Path) -> int:
    """Raises BadRequest for what is not there, and for what has no size before it is read, such as a pipe."""
    try:
        found = file.stat()
    except OSError as error:
        raise BadRequest(f"Cannot read {file}: {error.strerror}") from None
    if not stat.S_ISREG(found.st_mode):
        raise BadRequest(f"{file} is not an ordinary file: how long it is cannot be told.")
    return found.st_size


def find_fileset(client: Client, name: str) -> str:
    """`name`, if there is one: found out before a file is sent. Raises NotFound with the command that makes it."""
    try:
        client.filesets.get(name)
    except NotFound as error:
        workspace, slash, own = name.rpartition("/")
        where = f" --workspace {workspace}" if slash else ""
        raise NotFound(error.message, f"Make it first: nimhost files filesets create {own}{where}") from None
    return name


def new_fileset(client: Client, local_path: str) -> str:
    name = slug(Path(local_path).resolve().name)
    if not is_name(name):
        raise click.UsageError(f"No name for a fileset can be made of {local_path}: give FILESET.")
    try:
        return str(client.filesets.create(name)["name"])
    except AlreadyExists as error:
        again = f"To copy into it: nimhost files upload {shlex.quote(local_path)} {name}"
        raise AlreadyExists(error.message, again) from None


def download(fileset: str, remote_path: str, output: str) -> None:
    with open_client() as client:
        found = {file["path"]: file["size"] for file in client.filesets.list_files(fileset, remote_path)}
        if not found:
            what = f"'{remote_path}'" if remote_path else "file"
            raise NotFound(f"There is no {what} in fileset {fileset}.", f"nimhost files list {fileset}")
        for path, size_bytes in found.items():
            with progress(path, size_bytes) as show:
                place = fetch(client, fileset, path, local_place(path, remote_path, output), show)
            click.echo(str(place))
    click.echo(f"Downloaded {fileset}#{remote_path or '/'} to '{output}'")


def local_place(path: str, remote_path: str, output: str) -> Path:
    """Where a file goes: under `output`, by its path below `remote_path`. Raises BadRequest for one outside of it."""
    wanted = PurePosixPath(path)
    if wanted.is_absolute() or ".." in wanted.parts:
        raise BadRequest(f"The fileset has a file named '{path}': it would not be inside {output}.")
    base = PurePosixPath(remote_path)
    below = wanted.name if wanted == base else str(wanted.relative_to(base) if wanted.is_relative_to(base) else wanted)
    return Path(output, below)


@contextmanager
def progress(path: str, size_bytes: int) -> Iterator[Callable[[int], None]]:
    """To be told how many bytes of a file are through. Shown to people only, and of files that take a while."""
    if size_bytes < SHOWN_FROM_BYTES or not sys.stderr.isatty():
        yield lambda _: None
        return
    with click.progressbar(length=size_bytes, label=clean(path), file=sys.stderr) as bar:
        yield lambda done_bytes: bar.update(done_bytes - bar.pos)


def fetch(client: Client, fileset: str, path: str, place: Path, show: Callable[[int], None]) -> Path:
    """Whole or not at all."""
    draft = place.with_name(f".{place.name}.part")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with draft.open("wb") as file, closing(client.filesets.download(fileset, path)) as pieces:
            for piece in pieces:
                file.write(piece)
                show(file.tell())
        draft.replace(place)
    except OSError as error:
        raise BadRequest(f"Cannot write {place}: {error.strerror}") from None
    finally:
        draft.unlink(missing_ok=True)
    return place


def list_files(fileset: str, remote_path: str) -> None:
    with open_client() as client:
        rows = client.filesets.list_files(fileset, remote_path)
    print_list("files", rows, rows)


def delete(fileset: str, remote_path: str) -> None:
    with open_client() as client:
        client.filesets.delete_file(fileset, remote_path)
    click.echo(DELETED)
