"""Every deployment of the documentation, on a real engine whose images are fakes with the right names.

Prints what each asked for and what Docker was given, as `docker inspect` has it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import docker
import httpx
import pytest

from tests import images
from tests.e2e.conftest import MakeDaemon
from tests.e2e.daemon import GATEWAY, MODELS, DaemonProcess, containers_of
from tests.fakes.hub import FakeHub
from tests.spec_deployments import CASES, PARSER, TEMPLATE, Case, table
from tests.tiny import tiny_model

pytestmark = [pytest.mark.docker, pytest.mark.timeout(600)]
FILESETS = "/apis/files/v2/workspaces/default/filesets"
NGC_KEY = "nvapi-of-the-test"
GPUS = 4
REPOS = sorted({case.repo for case in CASES if case.repo})
IMAGES = sorted({case.image for case in CASES})


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[FakeHub]:
    tiny = tiny_model(tmp_path / "tiny")
    files = {path.name: path.read_bytes() for path in tiny.iterdir() if path.suffix != ".gguf"}
    with FakeHub() as hub:
        for repo in REPOS:
            hub.add(repo, files)
        yield hub


@pytest.fixture
def daemon(
    make_daemon: MakeDaemon, hub: FakeHub, gpu_requests: None, docker_engine: docker.DockerClient
) -> Iterator[DaemonProcess]:
    gpus = ", ".join(
        f'{{ name = "SIM-80G", memory_gib = 80, uuid = "GPU-spec-{os.getpid()}-{n}" }}' for n in range(GPUS)
    )
    images.tag_fake_engine(*IMAGES, client=docker_engine)
    daemon = make_daemon(
        NIMHOST_WEIGHTS__ENDPOINT=hub.url,
        NIMHOST_GPUS__SIMULATED=f"[{gpus}]",
        NIMHOST_MODELS__TOOL_CALL_PLUGIN__ENABLED="true",
        NGC_API_KEY=NGC_KEY,
    )
    daemon.post(FILESETS, {"name": "my-tool-plugin"}, 200)
    uploaded = daemon.http.put(f"{FILESETS}/my-tool-plugin/-/my_parser.py", content=PARSER.encode())
    assert uploaded.status_code == 200, uploaded.text
    yield daemon
    images.untag(*IMAGES, client=docker_engine)


def test_every_deployment_of_the_documentation(
    daemon: DaemonProcess, docker_engine: docker.DockerClient, capsys: pytest.CaptureFixture[str]
) -> None:
    own = environment(docker_engine.api.inspect_image(images.FAKE_ENGINE))
    rows = []
    for case in CASES:
        deploy(daemon, case)
        daemon.wait(case.name, "READY", 60)
        made = containers_of(docker_engine, daemon)[case.name]
        check_container(daemon, docker_engine, case, made, own)
        reply = ask(daemon, case)
        assert reply.status_code == 200, f"{case.name}: {reply.text}"
        rows.append(row_of(case, made, own, reply))
        daemon.delete(case.name, 40)
    with capsys.disabled():
        print(f"\n{table(rows)}\n{len(rows)} of {len(CASES)} deployments of the documentation")


def deploy(daemon: DaemonProcess, case: Case) -> None:
    if case.model and daemon.http.get(f"{MODELS}/models/{case.model}").status_code == 404:
        daemon.post(FILESETS, case.fileset, 200)
        made = daemon.post(f"{MODELS}/models", {"name": case.model, "fileset": f"default/{case.model}"})
        assert made["spec_status"] == "ready", made["spec_message"]
    daemon.post(f"{MODELS}/deployment-configs", case.config)
    daemon.post(f"{MODELS}/deployments", {"name": case.name, "config": f"{case.name}-config"})


def check_container(
    daemon: DaemonProcess, client: docker.DockerClient, case: Case, made: dict[str, Any], own: dict[str, str]
) -> None:
    """What Docker was given is what the table says, all of it."""
    env, args = case.filled(checkpoint(made))
    if case.engine == "nim":
        env["NGC_API_KEY"] = NGC_KEY
    assert client.api.inspect_image(case.image)["Id"] == made["Image"]
    assert environment(made) == own | env
    assert tuple(made["Config"]["Cmd"] or ()) == args
    mounts = {mount["Destination"]: mount for mount in made["Mounts"]}
    assert sorted(mounts) == sorted(case.mounts)
    assert [target for target, mount in mounts.items() if mount["RW"]] == [
        target for target in case.mounts if target == "/opt/nim/.cache"
    ]
    for target, content in case.files.items():
        assert Path(mounts[target]["Source"]).read_text() == content
        assert Path(mounts[target]["Source"]).stat().st_mode & 0o777 == 0o644
    known = [gpu["uuid"] for gpu in daemon.http.get("/apis/nimhost/v1/gpus").json()["data"]]
    (request,) = made["HostConfig"]["DeviceRequests"]
    assert len(request["DeviceIDs"]) == case.gpu
    assert set(request["DeviceIDs"]) <= set(known)
    assert request["Capabilities"] == [["gpu"]]


def checkpoint(made: dict[str, Any]) -> str:
    """Where the weights are inside of the container: the only snapshot of the mounted repository."""
    root = next((Path(m["Source"]) for m in made["Mounts"] if m["Destination"] == "/model-store"), None)
    if root is None:
        return ""
    (snapshot,) = (root / "snapshots").iterdir()
    return f"/model-store/snapshots/{snapshot.name}"


def environment(inspected: dict[str, Any]) -> dict[str, str]:
    return dict(entry.split("=", 1) for entry in inspected["Config"]["Env"])


def ask(daemon: DaemonProcess, case: Case) -> httpx.Response:
    """As the page does: through the provider of the deployment, by the name that is served."""
    path, body = case.ask
    name = f"default/{case.model}" if case.model else case.model_spec.get("model_name")
    body = body | ({"model": name} if name else {})
    return daemon.http.post(f"{GATEWAY}/provider/{case.name}/-/{path}", json=body)


def row_of(case: Case, made: dict[str, Any], own: dict[str, str], reply: httpx.Response) -> tuple[str, ...]:
    """For the table that is printed."""
    hidden = {"NGC_API_KEY", *own}
    env = {name: value for name, value in environment(made).items() if name not in hidden}
    short = {TEMPLATE: "<the page's template>", checkpoint(made): "<snapshot>"}
    shown = [f"{name}={short.get(value, value)}" for name, value in env.items()]
    args = [short.get(word, word) for word in made["Config"]["Cmd"] or ()]
    mounts = [f"{m['Destination']}{':rw' if m['RW'] else ''}" for m in made["Mounts"]]
    said = reply.json()
    text = said["choices"][0]["message"]["content"] if "choices" in said else json.dumps(said)
    return (
        f"{case.name}\n   asked  {json.dumps(case.model_spec)[:150]} {json.dumps(case.executor)}",
        f"\n   image  {case.image}",
        f"\n   env    {' '.join(shown)}",
        f"\n   args   {' '.join(args)}",
        f"\n   mounts {' '.join(sorted(mounts))}",
        f"\n   gpus   {len(made['HostConfig']['DeviceRequests'][0]['DeviceIDs'])}",
        f"\n   says   {text[:100]}",
    )
