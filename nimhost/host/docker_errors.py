"""What Docker's refusals mean: one table from its words to our errors, pure.

Docker has few status codes and no error codes, so its sentences are what there is to go by; the tests hold the ones
that real engines were seen to say.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator

from nimhost.errors import (
    DiskFull,
    DockerError,
    DockerUnavailable,
    GpuRuntimeMissing,
    GpuUnavailable,
    HostError,
    ImageNotFound,
    NameTaken,
    RegistryDenied,
    RegistryUnavailable,
)

GPU_HINT = (
    "Install the NVIDIA container toolkit, then run: "
    "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
)
_DRIVER_HINT = "Update the NVIDIA driver, or use an image made for the one that is installed (see: nvidia-smi)"
_SMI_HINT = "See what the driver says with: nvidia-smi"
_CREDENTIALS_HINT = (
    "Check the image's name and the credentials: for nvcr.io a secret with an NGC API key, "
    "for others run `docker login REGISTRY` as the user nimhost runs as"
)
_INSECURE_HINT = 'Add the registry to "insecure-registries" in /etc/docker/daemon.json and restart docker'
_CERTIFICATE_HINT = "Put the registry's CA certificate into /etc/docker/certs.d/REGISTRY/ca.crt"
_MOUNT_HINT = "Create it, or correct the path (it is looked up on the machine where Docker runs)"
_SPACE_HINT = "Make room where Docker keeps its images: docker system df, then docker image rm IMAGE"

_ANYWHERE: tuple[tuple[str, type[HostError], str | None], ...] = (
    (r"no space left on device|disk quota exceeded", DiskFull, _SPACE_HINT),
    (r"could not select device driver|unknown runtime|unknown or invalid runtime", GpuRuntimeMissing, GPU_HINT),
    (r"no known gpu vendor|unresolvable cdi devices|nvidia-container-runtime.*not found", GpuRuntimeMissing, GPU_HINT),
    (r"requirement error|unsatisfied condition: cuda", GpuRuntimeMissing, _DRIVER_HINT),
    (r"nvidia-container-cli|nvml error|nvidia-container-runtime-hook", GpuUnavailable, _SMI_HINT),
    (r"no such image", ImageNotFound, None),
    (r"bind source path does not exist", DockerError, _MOUNT_HINT),
)
"""First match wins, and so in the tables below. Patterns are searched in lower case."""

_PULLING: tuple[tuple[str, type[HostError], str | None], ...] = (
    (r"toomanyrequests|too many requests|\b429\b", RegistryUnavailable, "The registry limits pulls; log in, or wait"),
    (r"server gave http response to https client", HostError, _INSECURE_HINT),
    (r"x509|certificate", HostError, _CERTIFICATE_HINT),
    (
        r"unauthorized|denied|forbidden|authentication required|payment required|no basic auth|\b40[123]\b",
        RegistryDenied,
        _CREDENTIALS_HINT,
    ),
    (
        r"no matching manifest|no match for platform|specified platform",
        ImageNotFound,
        "The image is not made for this machine's architecture",
    ),
    (r"invalid reference format|invalid tag|must be lowercase", ImageNotFound, "An image is named REGISTRY/NAME:TAG"),
    (
        r"no such host|time ?out|timed out|deadline exceeded|connection re|unreachable|server misbehaving|\beof\b"
        r"|temporary failure|tls handshake|no route to host|\b50\d\b|unavailable|bad gateway|broken pipe|canceled",
        RegistryUnavailable,
        "Check that this machine reaches the registry.",
    ),
    (r"manifest unknown|name unknown|not found|does not exist|\b404\b", ImageNotFound, "Check the name and the tag"),
)


def refusal(status: int | None, message: str, *, image: str = "", pulling: bool = False) -> HostError:
    """The error that Docker's `message` (and HTTP `status`, None inside a stream) stands for."""
    words = message.lower()
    subject = f"Image {image}: " if image and (pulling or "no such image" in words) else "Docker: "
    if status == 409 and "already in use" in words:
        return NameTaken(f"Docker: {message}")
    for pattern, error, hint in (*_ANYWHERE, *(_PULLING if pulling else ())):
        if re.search(pattern, words):
            return error(subject + message, hint)
    return DockerError(subject + message)


USUAL_SOCKET = "unix:///var/run/docker.sock"


def unreachable(error: BaseException, host: str) -> DockerUnavailable:
    """Docker could not be talked to: why, as far as the chain of causes tells."""
    causes = list(chain(error))
    if any(isinstance(cause, PermissionError) for cause in causes):
        return DockerUnavailable(
            f"No permission to use Docker at {host}",
            "Run: sudo usermod -aG docker $USER, then log in again (or restart the session nimhost runs in)",
        )
    if any(isinstance(cause, FileNotFoundError | ConnectionRefusedError) for cause in causes):
        if host.startswith("unix:") and not (shutil.which("dockerd") or shutil.which("docker")):
            return DockerUnavailable("Docker is not installed", "See https://docs.docker.com/engine/install/")
        fix = "Run: sudo systemctl start docker" if host == USUAL_SOCKET else "Check DOCKER_HOST and [docker] host."
        return DockerUnavailable(f"Docker is not running at {host}", fix)
    if any(isinstance(cause, TimeoutError) or "timed out" in str(cause).lower() for cause in causes):
        return DockerUnavailable(f"Docker at {host} does not answer", "Run: sudo systemctl status docker")
    return DockerUnavailable(f"Docker at {host} cannot be reached: {causes[-1]}", "Run: sudo systemctl status docker")


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and all that caused it: libraries wrap by cause, by context and by argument."""
    queue, seen = [error], set[int]()
    while queue:
        current = queue.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        wrapped = (current.__cause__, current.__context__, *current.args, getattr(current, "reason", None))
        queue += [inner for inner in wrapped if isinstance(inner, BaseException)]
