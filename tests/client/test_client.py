"""The library against a wire on a real socket, blocking and async."""

from __future__ import annotations

import threading
from contextlib import aclosing, closing

import pytest

import nimhost
from nimhost import errors
from nimhost.client import AsyncClient, Client, Unreachable
from nimhost.client.resources import Resources
from nimhost.kinds import KINDS
from tests.cli.wire import FakeWire, Refusal, snapshot, sse
from tests.support import eventually, wait_until

HELLO = [{"role": "user", "content": "Hello!"}]


def test_every_kind_is_a_resource() -> None:
    with Client() as client:
        for key in KINDS:
            assert getattr(client, key.replace("-", "_")).kind.key == key
    assert {key.replace("-", "_") for key in KINDS} == set(Resources.__annotations__)


def test_crud_speaks_the_wire(wire: FakeWire) -> None:
    with Client() as client:
        made = client.models.create("tiny", fileset="default/tiny")
        assert (made.name, made["fileset"]) == ("tiny", "default/tiny")
        assert client.models.update("tiny", description="small").description == "small"
        assert client.models.get("default/tiny").description == "small"
        client.models.delete("tiny")
        with pytest.raises(nimhost.NotFound, match="Model 'default/tiny' not found"):
            client.models.get("tiny")
    assert [a.method for a in wire.asked] == ["POST", "PATCH", "GET", "DELETE", "GET"]


async def test_crud_speaks_the_wire_async(wire: FakeWire) -> None:
    async with AsyncClient() as client:
        await client.models.create("tiny", fileset="default/tiny")
        assert (await client.models.get("tiny")).fileset == "default/tiny"
        await client.models.delete("tiny")
        with pytest.raises(nimhost.NotFound):
            await client.models.get("tiny")


@pytest.mark.parametrize(
    ("kind", "method"),
    [("models", "PATCH"), ("providers", "PUT"), ("deployment_configs", "POST"), ("deployments", "POST")],
)
def test_update_does_what_the_kind_does(wire: FakeWire, kind: str, method: str) -> None:
    wire.put(kind.replace("_", "-"), "x1")
    with Client() as client:
        getattr(client, kind).update("x1", project="p")
    assert (wire.asked[-1].method, wire.asked[-1].body) == (method, {"project": "p"})
    assert wire.asked[-1].path.endswith("/x1")


def test_list_reads_every_page(wire: FakeWire) -> None:
    for number in range(5):
        wire.put("models", f"m{number}")
    with Client() as client:
        assert [m.name for m in client.models.list(sort="name")] == ["m0", "m1", "m2", "m3", "m4"]
    assert [a.query["page"] for a in wire.asked] == ["1", "2", "3"]
    assert wire.asked[-1].query["sort"] == "name"


def test_secret_value_may_be_called_data(wire: FakeWire) -> None:
    with Client() as client:
        client.secrets.create("key", data="v")
    assert wire.asked[-1].body == {"name": "key", "value": "v"}


def test_names_cannot_leave_their_place_in_the_path(wire: FakeWire) -> None:
    with Client() as client:
        for name in ("a/b/../../c", "", "a/", "/a"):
            with pytest.raises(nimhost.BadRequest, match="names no model"):
                client.models.delete(name)
        assert wire.asked == []
        with pytest.raises(nimhost.NimhostError):
            client.filesets.delete_file("a/b1", "../../c")
    assert wire.asked[-1].raw_path.endswith("/workspaces/a/filesets/b1/-/..%2F..%2Fc")


@pytest.mark.parametrize("cls", [c for c in errors.all_errors().values() if c.__module__ == "nimhost.errors"])
def test_every_error_comes_back_as_itself(wire: FakeWire, cls: type[errors.NimhostError]) -> None:
    wire.refuse["GET", "/models/x"] = Refusal(errors.status_of(cls), cls.__name__, "what happened", "what to do")
    with Client() as client, pytest.raises(errors.NimhostError) as caught:
        client.models.get("x")
    assert type(caught.value) is cls
    assert (caught.value.message, caught.value.hint) == ("what happened", "what to do")


def test_wrong_fields_are_named(wire: FakeWire) -> None:
    problem = {
        "type": "value_error",
        "loc": ["body", "executor_config", "gpu"],
        "msg": "must be at least 0",
        "input": -1,
    }
    wire.refuse["POST", "/deployment-configs"] = Refusal(422, "InvalidRequest", [problem])
    with Client() as client, pytest.raises(nimhost.InvalidRequest) as caught:
        client.deployment_configs.create("x")
    assert str(caught.value) == "executor_config.gpu: must be at least 0"
    assert caught.value.problems[0]["loc"] == ["body", "executor_config", "gpu"]


def test_nobody_listening_says_how_to_start(wire: FakeWire) -> None:
    wire.close()
    with Client() as client, pytest.raises(Unreachable, match=f"No nimhost at {wire.url}") as caught:
        client.models.list()
    assert (caught.value.hint or "").startswith("Start it with: nimhost serve")


async def test_nobody_listening_says_so_async(wire: FakeWire) -> None:
    wire.close()
    async with AsyncClient() as client:
        with pytest.raises(Unreachable):
            await client.models.list()


def test_proxy_of_the_environment_is_not_asked_for_loopback(wire: FakeWire, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    with Client() as client:
        assert client.models.list() == []


def test_token_is_sent_and_never_shown(wire: FakeWire) -> None:
    with Client(access_token="canary") as client:
        client.models.list()
        assert "canary" not in repr(client)
    assert wire.asked[-1].headers["authorization"] == "Bearer canary"


def test_chat_streams_as_it_comes(wire: FakeWire) -> None:
    gate = threading.Event()
    first, *rest = sse("Hel", "lo")
    wire.answer = [first, gate, *rest]
    with Client() as client, closing(client.chat("tiny", HELLO, temperature=0)) as chunks:
        assert next(chunks).choices[0].delta.role == "assistant"
        gate.set()
        assert "".join(c.choices[0].delta.get("content", "") for c in chunks) == "Hello"
    asked = wire.asked[-1]
    assert asked.path.endswith("/workspaces/default/openai/-/v1/chat/completions")
    assert asked.body == {"model": "default/tiny", "messages": HELLO, "stream": True, "temperature": 0}


def test_chat_that_is_closed_hangs_up(wire: FakeWire) -> None:
    wire.answer = [*sse("Hel")[:1], threading.Event()]
    with Client() as client:
        chunks = client.chat("openai/gpt-4", HELLO, provider="up")
        next(chunks)
        chunks.close()
        wait_until(lambda: wire.left)
    assert wire.asked[-1].path.endswith("/workspaces/default/provider/up/-/v1/chat/completions")
    assert wire.asked[-1].body["model"] == "openai/gpt-4"


async def test_chat_that_is_closed_hangs_up_async(wire: FakeWire) -> None:
    wire.answer = [*sse("Hel")[:1], threading.Event()]
    async with AsyncClient() as client:
        async with aclosing(client.chat("tiny", HELLO)) as chunks:
            await anext(chunks)
        await eventually(lambda: wire.left)


def test_chat_whose_upstream_dies_is_an_error(wire: FakeWire) -> None:
    wire.answer = [*sse("Hel")[:2], None]
    with Client() as client, pytest.raises(nimhost.UpstreamError, match="broke off"):
        list(client.chat("tiny", HELLO))


def test_chat_with_an_unknown_model_raises_before_the_first_chunk(wire: FakeWire) -> None:
    wire.refuse["POST", "/chat/completions"] = Refusal(404, "NotFound", "No model default/tiny", "nimhost ps")
    with Client() as client, pytest.raises(nimhost.NotFound, match="No model"):
        next(client.chat("tiny", HELLO))


async def test_progress_is_followed(wire: FakeWire) -> None:
    wire.put("deployments", "x1", config="x1")
    wire.script = [snapshot("PENDING"), snapshot("READY")]
    async with AsyncClient() as client, aclosing(client.deployments.follow_progress("x1")) as stream:
        assert [(await anext(stream)).status, (await anext(stream)).status] == ["PENDING", "READY"]


def test_progress_that_says_nothing_is_a_timeout(wire: FakeWire) -> None:
    wire.put("deployments", "x1", config="x1")
    with Client() as client, pytest.raises(nimhost.UpstreamTimeout):
        list(client.deployments.follow_progress("x1", quiet_s=0.05))


def test_logs_are_text(wire: FakeWire) -> None:
    wire.put("deployments", "x1", config="x1")
    wire.logs = "größer\n".encode()
    with Client() as client:
        assert "".join(client.deployments.logs("x1", tail=5, follow=True)) == "größer\n"
    assert wire.asked[-1].query == {"follow": "true", "tail": "5"}


async def test_wait_reports_each_entry_once_and_ends_when_ready(wire: FakeWire) -> None:
    row = wire.put("deployments", "x1", config="x1")
    row["status_history"] = [{"timestamp": "t1", "status": "CREATED", "status_message": "a"}]
    seen: list[str] = []

    def on_entry(entry: nimhost.client.Record) -> None:
        seen.append(entry.status)
        row["status_history"] = [*row["status_history"], {"timestamp": "t2", "status": "READY", "status_message": ""}][
            :2
        ]
        row["status"] = "READY"

    async with AsyncClient() as client:
        assert (await client.deployments.wait("x1", on_entry=on_entry)).status == "READY"
    assert seen == ["CREATED", "READY"]


@pytest.mark.parametrize("changes", [{"status": "ERROR", "status_message": "out of memory"}, {"desired": "stopped"}])
def test_wait_gives_up_on_what_cannot_become_ready(wire: FakeWire, changes: dict[str, str]) -> None:
    wire.put("deployments", "x1", config="x1", **changes)
    with Client() as client, pytest.raises(nimhost.NotReady) as caught:
        client.deployments.wait("x1")
    assert "out of memory" in caught.value.message or "stopped" in caught.value.message


def test_wait_ends_at_its_time(wire: FakeWire) -> None:
    wire.put("deployments", "x1", config="x1", status_message="needs 2 GPUs")
    with Client() as client, pytest.raises(nimhost.UpstreamTimeout, match="needs 2 GPUs"):
        client.deployments.wait("x1", timeout_s=0)


@pytest.mark.fault(20)
def test_wait_survives_a_restart_of_the_daemon(wire: FakeWire, monkeypatch: pytest.MonkeyPatch) -> None:
    wire.put("deployments", "x1", config="x1")
    pauses: list[float] = []

    def pause(duration_s: float) -> None:
        pauses.append(duration_s)
        if len(pauses) == 1:
            wire.close()  # so the next request finds nobody
        elif len(pauses) == 2:
            wire.restart().rows["deployments", "default", "x1"]["status"] = "READY"

    monkeypatch.setattr("time.sleep", pause)
    with Client() as client:
        assert client.deployments.wait("x1").status == "READY"
    assert len(pauses) == 2


def test_wait_for_gone_is_over_at_404(wire: FakeWire) -> None:
    with Client() as client:
        assert client.deployments.wait("x1", "DELETED") is None


def test_a_list_takes_the_largest_pages_there_are(wire: FakeWire) -> None:
    with Client() as client:
        client.filesets.list()
        client.deployments.list(page_size="5")
    assert [asked.query["page_size"] for asked in wire.asked] == ["100", "5"]


def test_a_provider_of_another_workspace_is_asked_there(wire: FakeWire) -> None:
    wire.put("providers", "up", workspace="team", status="READY", status_message="")
    with Client() as client, pytest.raises(nimhost.NimhostError):
        client.providers.ready("team/up")
    assert wire.asked[-1].path == "/apis/inference-gateway/v2/workspaces/team/provider/up/ready"


def test_a_deletion_can_be_tried(wire: FakeWire) -> None:
    wire.put("models", "m1")
    with Client() as client:
        client.models.delete("m1", dry_run=True)
        assert wire.asked[-1].query == {"dry_run": "true"}
