"""A provider that leads back here, directly or through another nimhost, costs one refused request, not everything."""

from __future__ import annotations

import httpx
import pytest

from nimhost.api.own_address import check_not_own, is_own
from nimhost.config import Server
from nimhost.deployments.discovery import Question, judge
from nimhost.entities import Entity, Provider, ServedModel
from nimhost.errors import InvalidRequest
from nimhost.gateway.routes import Upstream
from nimhost.refs import Ref
from tests.fakes.engine import FakeEngine
from tests.gateway.conftest import Door, G, engine_upstream, open_door

BODY = b'{"model": "m", "messages": []}'


def leading_to(door: Door, of: Door, path: str = "") -> Upstream:
    """A provider of `of`, as its daemon would make it."""
    return Upstream(
        provider=Ref("default", "me"),
        base_url=f"{door.url}{path}",
        served=(ServedModel("default/m", "m"),),
        hop=of.gateway.hop,
    )


@pytest.mark.fault(40)
@pytest.mark.parametrize("path", ["", "/v1", f"{G}/default/provider/me/-", f"{G}/default/openai/-"])
async def test_a_provider_that_leads_here_is_refused_at_once(door: Door, path: str) -> None:
    door.route(leading_to(door, door, path))
    for asked in ("/v1/chat/completions", f"{G}/default/provider/me/-/v1/chat/completions"):
        reply = await door.chat(BODY, asked)
        assert (reply.status, reply.headers["x-nimhost-error"]) == (508, "RequestLoop")
        assert reply.headers["x-should-retry"] == "false"
        assert "come back to the nimhost that sent it on" in reply.json()["error"]["message"]


@pytest.mark.fault(40)
async def test_two_that_lead_to_each_other_are_found_out(door: Door) -> None:
    async with open_door() as other:
        door.route(leading_to(other, door))
        other.route(leading_to(door, other))
        for asked in (door, other):
            reply = await asked.chat(BODY, "/v1/chat/completions")
            assert (reply.status, reply.headers["x-nimhost-error"]) == (508, "RequestLoop")


async def test_a_nimhost_behind_another_serves(door: Door, engine: FakeEngine) -> None:
    async with open_door() as other:
        door.route(leading_to(other, door))
        other.route(engine_upstream(engine, served=(ServedModel("default/m", "qwen-served"),)))
        assert (await door.chat(BODY, "/v1/chat/completions")).status == 200
    marks = [value for name, value in engine.requests[-1].headers if name == "x-nimhost-hop"]
    assert marks == [door.gateway.hop]


async def test_the_list_of_models_is_refused_to_ourselves_and_said_of_the_provider(door: Door) -> None:
    door.route(leading_to(door, door))
    row = Entity(kind="providers", id="p", workspace="default", name="me", created_at="", updated_at="",
                 wish=Provider(host_url=door.url))  # fmt: skip
    url = Question(provider=row).url
    async with httpx.AsyncClient() as client:
        reply = await client.get(url, headers={"x-nimhost-hop": door.gateway.hop})
    found = judge(row, url, reply.status_code, None)
    assert found.status == "ERROR"
    assert "leads back to this nimhost" in found.status_message


# --- what can be seen before anybody is asked


@pytest.mark.parametrize(
    ("host", "own", "others"),
    [
        ("127.0.0.1", ["127.0.0.1", "localhost", "LOCALHOST.", "a.localhost", "0.0.0.0", "[::ffff:127.0.0.1]"],
         ["127.0.0.2", "10.0.0.1", "[::1]", "my.example", "example.org"]),
        ("localhost", ["127.0.0.1", "[::1]", "localhost"], ["10.0.0.1"]),
        ("0.0.0.0", ["127.0.0.1", "127.9.9.9", "[::1]", "[::]", "localhost", "my.example"], ["10.0.0.1"]),
        ("10.0.0.1", ["10.0.0.1", "my.example"], ["127.0.0.1", "localhost", "0.0.0.0", "10.0.0.2"]),
    ],
)  # fmt: skip
def test_our_own_address_is_known_by_all_its_names(host: str, own: list[str], others: list[str]) -> None:
    names = [] if host == "127.0.0.1" else ["My.Example"]
    server = Server(host=host, port=8080, allowed_hosts=names)
    assert [name for name in own if not is_own(f"http://{name}:8080/v1", server)] == []
    assert [name for name in others if is_own(f"http://{name}:8080/v1", server)] == []
    assert not is_own(f"http://{own[0]}:8081/v1", server)


def test_a_port_that_is_not_named_is_the_one_of_the_scheme() -> None:
    assert is_own("http://localhost/v1", Server(port=80))
    assert is_own("https://localhost", Server(port=443))
    assert not is_own("https://localhost", Server(port=80))


def test_our_own_address_is_refused_by_field() -> None:
    with pytest.raises(InvalidRequest, match="host_url: is where nimhost itself listens"):
        check_not_own("http://localhost:8080/v1", Server())
