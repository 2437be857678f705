"""Docker's JSON, read and written, without Docker."""

from __future__ import annotations

from typing import Any

import pytest

from nimhost.engines.spec import ContainerSpec, Mount, Probe
from nimhost.host import docker_replies as replies
from nimhost.host.container import Launch
from nimhost.host.docker_pull import Pull
from nimhost.host.docker_requests import container_body, refused_limits


def inspected(**changes: Any) -> dict[str, Any]:
    reply: dict[str, Any] = {
        "Id": "ab12",
        "Name": "/nimhost-x",
        "Image": "sha256:77",
        "Config": {"Image": "some/image:1", "Labels": {"a": "b"}, "Env": ["A=1"]},
        "HostConfig": {"DeviceRequests": None, "Runtime": "runc"},
        "NetworkSettings": {"Ports": {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "49153"}], "9/udp": None}},
        "State": {
            "Status": "running", "ExitCode": 0, "OOMKilled": False, "Error": "",
            "StartedAt": "2026-11-20T11:00:00.5Z", "FinishedAt": "0001-01-01T00:00:00Z",
        },
    }  # fmt: skip
    for key, value in changes.items():
        reply[key] = {**reply[key], **value}
    return reply


def test_running_container() -> None:
    container = replies.container(inspected())

    assert (container.name, container.state, container.exit_code, container.port) == (
        "nimhost-x",
        "running",
        None,
        49153,
    )
    assert container.started_at == pytest.approx(1795172400.5)
    assert container.finished_at == 0


def test_exited_container() -> None:
    state = {
        "Status": "exited",
        "ExitCode": 137,
        "OOMKilled": True,
        "FinishedAt": "2026-11-20T12:00:01.123456789+01:00",
    }
    container = replies.container(inspected(State=state, NetworkSettings={"Ports": {}}))

    assert (container.state, container.exit_code, container.oom_killed, container.port) == ("exited", 137, True, None)
    assert container.finished_at == pytest.approx(1795172401.123457)


def test_container_that_never_started_has_no_exit_code() -> None:
    state = {"Status": "created", "ExitCode": 128, "Error": "no such user", "StartedAt": "0001-01-01T00:00:00Z"}
    container = replies.container(inspected(State=state))

    assert (container.exit_code, container.error, container.started_at) == (None, "no such user", 0.0)


@pytest.mark.fault(19)
def test_only_a_loopback_port_is_ours() -> None:
    ports = {"8000/tcp": [{"HostIp": "0.0.0.0", "HostPort": "80"}, {"HostIp": "127.0.0.1", "HostPort": "81"}]}

    assert replies.loopback_port(ports) == 81
    assert replies.loopback_port({"8000/tcp": [{"HostIp": "0.0.0.0", "HostPort": "80"}]}) is None
    assert replies.loopback_port({"9000/tcp": [{"HostIp": "127.0.0.1", "HostPort": "82"}]}) == 82


@pytest.mark.fault(6)
@pytest.mark.parametrize(
    ("host_config", "env", "expected"),
    [
        ({"DeviceRequests": None}, [], ()),
        ({"DeviceRequests": [{"DeviceIDs": ["GPU-a", "GPU-b"], "Capabilities": [["gpu"]]}]}, [], ("GPU-a", "GPU-b")),
        ({"DeviceRequests": [{"Count": 2, "DeviceIDs": None, "Capabilities": [["gpu"]]}]}, [], ("count:2",)),
        ({"DeviceRequests": [{"Count": -1, "Capabilities": [["gpu"]]}]}, [], ("all",)),
        ({"DeviceRequests": [{"Driver": "nvidia", "Count": 0, "Capabilities": [["gpu"]]}]}, [], ()),
        ({"DeviceRequests": [{"Driver": "cdi", "DeviceIDs": ["nvidia.com/gpu=0"]}]}, [], ("0",)),
        ({"DeviceRequests": [{"Driver": "cdi", "DeviceIDs": ["vendor.test/nic=0"]}]}, [], ()),
        ({"Runtime": "nvidia"}, ["NVIDIA_VISIBLE_DEVICES=all"], ("all",)),
        ({"Runtime": "nvidia"}, ["NVIDIA_VISIBLE_DEVICES=GPU-a,1"], ("GPU-a", "1")),
        ({"Runtime": "nvidia"}, ["NVIDIA_VISIBLE_DEVICES=void"], ()),
        ({"Runtime": "runc"}, ["NVIDIA_VISIBLE_DEVICES=all"], ()),
    ],
)
def test_gpus_of_any_container_are_seen(host_config: dict[str, Any], env: list[str], expected: tuple[str, ...]) -> None:
    assert replies.gpu_ids(host_config, env) == expected


def test_listing_key_changes_with_state_port_and_exit_but_not_with_the_clock() -> None:
    row = {"State": "exited", "Names": ["/x"], "Ports": [], "Status": "Exited (1) 2 seconds ago"}
    key = replies.listing_key(row)

    assert replies.listing_key({**row, "Status": "Exited (1) 3 minutes ago"}) == key
    assert replies.listing_key({**row, "Status": "Exited (2) 2 seconds ago"}) != key
    assert replies.listing_key({**row, "State": "running", "Status": "Up 1 second"}) != key
    port = {"IP": "127.0.0.1", "PrivatePort": 8000, "PublicPort": 49153, "Type": "tcp"}
    assert replies.listing_key({**row, "Ports": [port]}) != key


def test_engine_that_lists_nvidia_has_it_and_one_that_does_not_leaves_it_open() -> None:
    version = {"Version": "28.0", "ApiVersion": "1.48"}

    assert replies.engine_facts(version, {"Runtimes": {"runc": {}}}).nvidia_runtime is None
    assert replies.engine_facts(version, {"Runtimes": {"nvidia": {}}}).nvidia_runtime is True
    assert replies.engine_facts(version, {"DiscoveredDevices": [{"ID": "nvidia.com/gpu=0"}]}).nvidia_runtime is True


@pytest.mark.parametrize(
    ("info", "found"),
    [
        ({"DriverStatus": [["Backing Filesystem", "extfs"]]}, ("/docker", False)),
        ({"DriverStatus": None}, ("/docker", False)),
        ({"DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]]}, ("/docker", True)),
        (
            {
                "DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]],
                "Containerd": {"Address": "/run/containerd/containerd.sock"},
            },
            ("/var/lib/containerd", True),
        ),
        (
            {
                "DriverStatus": [["driver-type", "io.containerd.snapshotter.v1"]],
                "Containerd": {"Address": "/var/run/docker/containerd/containerd.sock"},
            },
            ("/docker", True),
        ),
    ],
)
def test_where_images_are_kept_and_whether_packed_too(info: dict[str, Any], found: tuple[str, bool]) -> None:
    facts = replies.engine_facts({"Version": "29.0", "ApiVersion": "1.52"}, {"DockerRootDir": "/docker", **info})
    assert (facts.root_dir, facts.keeps_packed) == found


def test_image_digest_is_that_of_its_own_repository() -> None:
    reply = {"Id": "sha256:1", "RepoDigests": ["other/x@sha256:2", "reg.test:5000/x@sha256:3"], "Config": None}

    assert replies.image("reg.test:5000/x:1", reply).digest == "reg.test:5000/x@sha256:3"
    assert replies.image("sha256:1", reply).digest == "other/x@sha256:2"


def test_event_of_an_exit() -> None:
    attributes = {"image": "x", "name": "nimhost-x", "exitCode": "137", "io.nimhost.owner": "me"}
    event = replies.event({"Type": "container", "Action": "die", "Actor": {"ID": "ab", "Attributes": attributes}})

    assert (event.action, event.container_id, event.name, event.exit_code) == ("die", "ab", "nimhost-x", 137)
    assert event.labels == {"io.nimhost.owner": "me"}


# --- pull ----------------------------------------------------------------------------------------------------------


def pulled(*lines: tuple[str, str | None, int, int]) -> Pull:
    pull = Pull()
    for status, layer, current, total in lines:
        line: dict[str, Any] = {
            "status": status,
            "progressDetail": {"current": current, "total": total} if total else {},
        }
        pull = pull.after({**line, "id": layer} if layer else line)
    return pull


def test_bytes_of_layers_add_up_and_unpacking_does_not_count_again() -> None:
    start = [("Pulling from library/x", "1", 0, 0), ("Already exists", "a", 0, 0), ("Pulling fs layer", "b", 0, 0)]
    loading = [*start, ("Pulling fs layer", "c", 0, 0), ("Downloading", "b", 10, 100), ("Downloading", "c", 5, 50)]

    progress = pulled(*loading).progress
    assert (progress.done_bytes, progress.total_bytes, progress.layers_done, progress.layers) == (15, 150, 1, 3)

    unpacking = [*loading, ("Download complete", "b", 0, 0), ("Extracting", "b", 20, 100)]
    progress = pulled(*unpacking).progress
    assert (progress.done_bytes, progress.total_bytes, progress.layers_done) == (105, 150, 1)

    done = [*unpacking, ("Pull complete", "b", 0, 0), ("Download complete", "c", 0, 0), ("Pull complete", "c", 0, 0)]
    progress = pulled(*done, ("Status: Downloaded newer image for x:1", None, 0, 0)).progress
    assert (progress.done_bytes, progress.total_bytes, progress.layers_done) == (150, 150, 3)


def test_everything_fetched_means_the_registry_is_not_to_blame() -> None:
    loading = [("Downloading", "a", 10, 100), ("Already exists", "b", 0, 0)]

    assert not Pull().fetched
    assert not pulled(*loading).fetched
    assert not pulled(*loading, ("Verifying Checksum", "a", 0, 0)).fetched
    assert pulled(*loading, ("Download complete", "a", 0, 0)).fetched
    assert pulled(*loading, ("Download complete", "a", 0, 0), ("Extracting", "a", 10, 100)).fetched


def test_docker_s_own_retry_is_shown_until_bytes_come_again() -> None:
    retrying = [("Downloading", "a", 10, 100), ("Retrying in 5 seconds", "a", 0, 0)]

    assert pulled(*retrying).progress.message == "Retrying in 5 seconds"
    assert pulled(*retrying, ("Downloading", "a", 20, 100)).progress.message == ""


# --- requests ------------------------------------------------------------------------------------------------------


@pytest.mark.fault(19)
def test_container_is_hardened_and_published_on_loopback_only() -> None:
    spec = ContainerSpec(
        image="some/image:1", args=("--x",), env={"A": "1", "B": "1"}, mounts=(Mount("/src", "/dst"),),
        probe=Probe("/"), shm_bytes=16, user="1000:1000",
    )  # fmt: skip
    body = container_body(
        Launch(
            spec=spec, name="n", image_id="sha256:77", env={"B": "2"}, labels={"l": "m"}, gpu_ids=("GPU-a",),
            ulimits={"memlock": -1},
        )
    )  # fmt: skip
    host = body["HostConfig"]

    assert body["Image"] == "sha256:77"
    assert body["Cmd"] == ["--x"]
    assert sorted(body["Env"]) == ["A=1", "B=2"]
    assert body["User"] == "1000:1000"
    assert host["PortBindings"] == {"8000/tcp": [{"HostIp": "127.0.0.1", "HostPort": ""}]}
    assert host["Mounts"] == [{"Type": "bind", "Source": "/src", "Target": "/dst", "ReadOnly": True}]
    assert host["DeviceRequests"] == [
        {"Driver": "nvidia", "Count": 0, "DeviceIDs": ["GPU-a"], "Capabilities": [["gpu"]]}
    ]
    assert host["Ulimits"] == [{"Name": "memlock", "Soft": -1, "Hard": -1}]
    assert (host["Init"], host["RestartPolicy"], host["ShmSize"]) == (True, {"Name": "no"}, 16)
    assert (host["SecurityOpt"], host["CapDrop"]) == (["no-new-privileges"], ["ALL"])
    assert host["LogConfig"] == {"Type": "json-file", "Config": {"max-size": "50m", "max-file": "3"}}


def test_container_without_gpus_asks_for_none() -> None:
    body = container_body(Launch(spec=ContainerSpec(image="x", probe=Probe("/")), name="n"))

    assert body["Image"] == "x"
    assert body["HostConfig"]["DeviceRequests"] == []


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    ("message", "refused"),
    [
        ("setting rlimits for ready process: error setting rlimit type 8: operation not permitted", ("memlock",)),
        ("error setting rlimit type 3: operation not permitted", ("stack",)),
        ("error setting rlimits", ("memlock", "stack")),
        ("no such user", ()),
    ],
)
def test_refused_limit_is_recognised(message: str, refused: tuple[str, ...]) -> None:
    assert refused_limits(message, {"memlock": -1, "stack": 67_108_864}) == refused
