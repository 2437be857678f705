"""What Docker is asked for: the JSON of its API, from our values. Pure."""

from __future__ import annotations

import re
import resource
from collections.abc import Mapping
from typing import Any

from nimhost.host.container import Launch

Json = dict[str, Any]

_LOGS = {"Type": "json-file", "Config": {"max-size": "50m", "max-file": "3"}}


def container_body(launch: Launch) -> Json:
    """The body of `/containers/create`."""
    spec = launch.spec
    port = f"{spec.port}/tcp"
    return {
        "Image": launch.image_id or spec.image,
        "Cmd": list(spec.args),
        "Env": [f"{key}={value}" for key, value in {**spec.env, **launch.env}.items()],
        "Labels": launch.labels,
        "User": spec.user or "",
        "ExposedPorts": {port: {}},
        "HostConfig": {
            "Init": True,
            "RestartPolicy": {"Name": "no"},
            # Loopback only, and the number left to Docker: it is read back after every start.
            "PortBindings": {port: [{"HostIp": "127.0.0.1", "HostPort": ""}]},
            "ShmSize": spec.shm_bytes or 0,
            # Mounts, not Binds: for those Docker would make a missing directory instead of refusing.
            "Mounts": [
                {"Type": "bind", "Source": mount.source, "Target": mount.target, "ReadOnly": mount.read_only}
                for mount in spec.mounts
            ],
            "DeviceRequests": [gpu_request(*launch.gpu_ids)] if launch.gpu_ids else [],
            "Ulimits": [{"Name": name, "Soft": value, "Hard": value} for name, value in launch.ulimits.items()],
            "LogConfig": _LOGS,
            "SecurityOpt": ["no-new-privileges"],
            "CapDrop": ["ALL"],
        },
    }


def gpu_request(*gpu_ids: str) -> Json:
    """GPUs by uuid or index. For none it still needs Docker's GPU support, which makes it a probe of that."""
    return {"Driver": "nvidia", "Count": 0, "DeviceIDs": list(gpu_ids), "Capabilities": [["gpu"]]}


def probe_labels(owner: str) -> dict[str, str]:
    """Of the container that probes GPU support, by which one that a killed daemon left is found."""
    return {"io.nimhost.owner": owner, "io.nimhost.probe": "gpu"}


def probe_body(image: str, owner: str) -> Json:
    """A container that cannot run, and that fails in another way where there is no GPU support."""
    devices = {"DeviceRequests": [gpu_request()]}
    return {"Image": image, "Cmd": ["/none"], "Labels": probe_labels(owner), "HostConfig": devices}


def refused_limits(message: str, ulimits: Mapping[str, int]) -> tuple[str, ...]:
    """Which of these limits the machine refused, by what Docker said when the container did not start."""
    if "rlimit" not in message:
        return ()
    number = re.search(r"rlimit type (\d+)", message)
    named = [name for name in ulimits if number and getattr(resource, f"RLIMIT_{name.upper()}", -1) == int(number[1])]
    return tuple(named or ulimits)
