"""What a container should be: the output of a recipe, and all that the Docker side needs to know."""

from __future__ import annotations

import hashlib

import msgspec
from msgspec import Struct

ENGINE_PORT = 8000
WEIGHTS_DIR = "/model-store"
ADAPTERS_DIR = "/loras"
FILES_DIR = "/nimhost"
"""Where an engine finds the files that nimhost writes for it: a chat template, a tool parser."""


class Mount(Struct, frozen=True, order=True):
    """A host directory or file inside the container, read-only unless said otherwise."""

    source: str
    target: str
    read_only: bool = True


class Probe(Struct, frozen=True):
    """How to tell that an engine is ready.

    `health_path` answers 200, and `models_path` lists every name in `served_names`. An engine without served names
    may have no model list at all; with `serves_any`, one that it has must not be empty.
    """

    health_path: str
    served_names: tuple[str, ...] = ()
    models_path: str = "/v1/models"
    serves_any: bool = False


class ContainerSpec(Struct, frozen=True, kw_only=True):
    """A container to be, without the GPUs (chosen when it starts) and without secret values (put in when it starts)."""

    image: str
    args: tuple[str, ...] = ()
    """Appended to the image's entrypoint."""
    env: dict[str, str] = {}
    secret_env: dict[str, str] = {}
    """Environment variable -> ref of the secret (`workspace/name`) whose value it gets."""
    mounts: tuple[Mount, ...] = ()
    files: dict[str, str] = {}
    """Path in the container -> content of a file that is written for it and mounted read-only."""
    probe: Probe
    gpus: int = 0
    port: int = ENGINE_PORT
    shm_bytes: int | None = None
    user: str | None = None
    """`user`, `user:group`, or `:group` for the image's user in another group. None: as the image says."""
    policy: str = "generic"
    """Which paths the gateway lets through: `vllm`, `nim` or `generic`."""
    warnings: tuple[str, ...] = ()
    """What works but is hardly what somebody wanted."""

    def user_in(self, image_user: str) -> str | None:
        """What Docker is told, which knows no group without a user. `image_user`: what the image says, may be empty."""
        if self.user is None or not self.user.startswith(":"):
            return self.user
        return f"{image_user.partition(':')[0] or 0}{self.user}"


def spec_hash(wish: object) -> str:
    """A short name of a wish: 12 hex digits over its canonical JSON."""
    return hashlib.sha256(msgspec.json.encode(wish, order="sorted")).hexdigest()[:12]
