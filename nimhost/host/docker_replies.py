"""What the Docker engine says, as values: its JSON in, frozen Structs out. Pure; nothing here talks to it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any

from nimhost.host.container import Container, ContainerEvent, EngineFacts, Image

Json = Mapping[str, Any]


CONNECTED = ContainerEvent(kind="engine", action="connected")
_CONTAINERD = ("/run/containerd/containerd.sock", "/var/run/containerd/containerd.sock")
_CONTAINERD_DIR = "/var/lib/containerd"
_NOT_LABELS = {"image", "name", "exitCode", "signal", "execDuration", "oldName"}


def engine_facts(version: Json, info: Json) -> EngineFacts:
    """From `/version` and `/info`."""
    devices = [device.get("ID", "") for device in info.get("DiscoveredDevices") or ()]
    packed = ["driver-type", "io.containerd.snapshotter.v1"] in (info.get("DriverStatus") or ())
    listed = "nvidia" in (info.get("Runtimes") or {}) or any(d.startswith("nvidia.com/gpu") for d in devices)
    return EngineFacts(
        version=version["Version"],
        api_version=version["ApiVersion"],
        root_dir=_images_dir(info) if packed else info.get("DockerRootDir", ""),
        keeps_packed=packed,
        architecture=version.get("Arch") or "",
        nvidia_runtime=True if listed else None,
    )


def _images_dir(info: Json) -> str:
    """Of an engine whose images are kept by containerd: that of the system has a directory of its own
    (https://docs.docker.com/engine/storage/containerd/)."""
    address = (info.get("Containerd") or {}).get("Address") or ""
    return _CONTAINERD_DIR if address in _CONTAINERD else info.get("DockerRootDir", "")


def image(name: str, reply: Json) -> Image:
    """From `/images/NAME/json`."""
    config = reply.get("Config") or {}
    digests: list[str] = reply.get("RepoDigests") or []
    own = [digest for digest in digests if name.startswith(digest.partition("@")[0])]
    return Image(
        id=reply["Id"],
        name=name,
        size_bytes=reply.get("Size") or 0,
        env=environment(config.get("Env")),
        user=config.get("User") or "",
        entrypoint=tuple(config.get("Entrypoint") or ()),
        architecture=reply.get("Architecture") or "",
        digest=next(iter(own or digests), None),
    )


def environment(lines: Iterable[str] | None) -> dict[str, str]:
    return dict(line.partition("=")[::2] for line in lines or ())


def container(reply: Json) -> Container:
    """From `/containers/ID/json`."""
    state = reply["State"]
    finished_at = unix_time(state.get("FinishedAt"))
    return Container(
        id=reply["Id"],
        name=reply["Name"].lstrip("/"),
        image=reply["Config"].get("Image") or reply.get("Image", ""),
        labels=dict(reply["Config"].get("Labels") or {}),
        state=state["Status"],
        exit_code=state.get("ExitCode") if finished_at and state["Status"] in ("exited", "dead") else None,
        oom_killed=bool(state.get("OOMKilled")),
        error=state.get("Error") or "",
        started_at=unix_time(state.get("StartedAt")),
        finished_at=finished_at,
        port=loopback_port((reply.get("NetworkSettings") or {}).get("Ports")),
        gpu_ids=gpu_ids(reply.get("HostConfig") or {}, reply["Config"].get("Env")),
        mounts=tuple(m["Source"] for m in reply.get("Mounts") or () if m.get("Type") == "bind"),
    )


def loopback_port(ports: Mapping[str, Sequence[Json] | None] | None) -> int | None:
    """The host port published on 127.0.0.1, that of 8000/tcp first."""
    published = {
        inside: int(binding["HostPort"])
        for inside, bindings in (ports or {}).items()
        for binding in bindings or ()
        if binding.get("HostIp") == "127.0.0.1" and binding.get("HostPort")
    }
    return published.get("8000/tcp") or next(iter(published.values()), None)


def gpu_ids(host_config: Json, env: Iterable[str] | None) -> tuple[str, ...]:
    """The GPUs asked for by device requests, or by the environment where NVIDIA's own runtime is used."""
    found: list[str] = []
    for request in host_config.get("DeviceRequests") or ():
        if not _for_gpus(request):
            continue
        count = request.get("Count") or 0
        if request.get("DeviceIDs"):
            found += [device.removeprefix("nvidia.com/gpu=") for device in request["DeviceIDs"]]
        elif count:
            found.append("all" if count < 0 else f"count:{count}")
    if not found and host_config.get("Runtime") == "nvidia":
        visible = environment(env).get("NVIDIA_VISIBLE_DEVICES", "")
        found = [device for device in visible.split(",") if device not in ("", "none", "void")]
    return tuple(found)


def _for_gpus(request: Json) -> bool:
    capabilities = {capability for group in request.get("Capabilities") or () for capability in group}
    return (
        "gpu" in capabilities
        or request.get("Driver") == "nvidia"
        or any(device.startswith("nvidia.com/gpu") for device in request.get("DeviceIDs") or ())
    )


def unix_time(text: str | None) -> float:
    """Docker's RFC 3339 with nanoseconds; 0 for its zero time, the year 1."""
    if not text or text.startswith("0001-"):
        return 0.0
    whole, fraction, zone = re.fullmatch(r"([^.Z+]+?)(\.\d+)?(Z|[+-]\d\d:\d\d)", text).groups()  # type: ignore[union-attr]
    moment = datetime.fromisoformat(whole + zone.replace("Z", "+00:00"))
    return moment.timestamp() + float(fraction or 0)


def listing_key(row: Json) -> tuple[object, ...]:
    """Of a row of `/containers/json`: unchanged means that an earlier inspect still holds."""
    ports = sorted((p.get("IP") or "", p["PrivatePort"], p.get("PublicPort") or 0) for p in row.get("Ports") or ())
    return row["State"], row.get("Names") and tuple(row["Names"]), tuple(ports), _exit_code(row)


def listed(row: Json, problem: str) -> Container | None:
    """From a row of `/containers/json` alone: of one that Docker cannot describe, as when its files are gone. None
    where it may run, for then nobody knows which GPUs it holds."""
    if row["State"] not in ("created", "exited", "removing", "dead"):
        return None
    return Container(
        id=row["Id"],
        name=next(iter(row.get("Names") or ()), "").lstrip("/"),
        image=row.get("Image") or "",
        labels=dict(row.get("Labels") or {}),
        state=row["State"],
        exit_code=_exit_code(row),
        error=problem,
    )


def _exit_code(row: Json) -> int | None:
    said = re.match(r"Exited \((-?\d+)\)", row.get("Status") or "")
    return int(said[1]) if said else None


def event(reply: Json) -> ContainerEvent:
    """From one line of `/events`. The labels come mixed with Docker's own attributes."""
    actor = reply.get("Actor") or {}
    attributes: dict[str, str] = actor.get("Attributes") or {}
    kind = reply.get("Type", "container")
    code = attributes.get("exitCode")
    return ContainerEvent(
        kind=kind,
        action=reply.get("Action") or reply.get("status") or "",
        container_id=actor.get("ID", "") if kind == "container" else "",
        name=attributes.get("name", ""),
        exit_code=int(code) if code else None,
        labels={k: v for k, v in attributes.items() if k not in _NOT_LABELS} if kind == "container" else {},
    )
