"""`/openapi.json` says what is served: the same routes, valid OpenAPI 3.1, and replies that are as it promises."""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import schemathesis

from nimhost.api.app import control_routes
from nimhost.api.openapi import document, encoded
from nimhost.api.schemas import NAME
from nimhost.kinds import KINDS, Kind
from nimhost.refs import is_name
from nimhost.store import now
from tests.api.conftest import open_world
from tests.contract.conftest import Served

Json = dict[str, Any]
FUZZ_BUDGET_S = 45
WORKSPACES = """
[dictionaries.workspaces]
values = ["default", "second"]
[parameters]
"path.workspace" = { dictionary = "workspaces" }
"""
"""Else nearly all that is asked for is in a workspace that does not exist."""
CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "unsupported_method", "use_after_free",
)  # fmt: skip


def operations(gateway: bool) -> dict[tuple[str, str], Json]:
    return {
        (verb.upper(), path): operation
        for path, item in document()["paths"].items()
        for verb, operation in item.items()
        if verb != "parameters" and (operation["tags"] == ["gateway"]) == gateway
    }


async def test_every_route_that_is_served_is_described_and_no_other(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        routes = control_routes(world.parts)
    served = {
        (method, re.sub(r":\w+\}", "}", route.path))
        for route in routes
        for method in (route.methods or ())
        if method != "HEAD"
    }
    described = set(operations(gateway=False))
    assert described - served == set()
    assert served - described == set()


def test_what_lists_are_asked_beside_the_page_is_described() -> None:
    asked = {
        operation["tags"][0]: {parameter["name"] for parameter in operation["parameters"]}
        for (method, path), operation in operations(gateway=False).items()
        if method == "GET" and path in [kind.path("{workspace}") for kind in KINDS.values()]
    }
    more = {key: names - {"page", "page_size", "sort", "filter"} for key, names in asked.items()}
    assert {key: names for key, names in more.items() if names} == {
        "models": {"verbose"}, "deployments": {"all_versions"}, "deployment-configs": {"all_versions"},
        "virtual-models": {"exclude_autoprovisioned"},
    }  # fmt: skip


def test_it_is_valid_openapi_and_every_operation_has_its_own_id() -> None:
    schemathesis.openapi.from_dict(document()).validate()
    ids = [operation["operationId"] for gateway in (True, False) for operation in operations(gateway).values()]
    assert len(ids) == len(set(ids))


async def test_it_is_made_once_and_served_as_it_is(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        replies = [await world("GET", "/openapi.json") for _ in range(2)]
    assert [reply.content for reply in replies] == [encoded(), encoded()]
    assert encoded() is encoded()
    assert replies[0].headers["content-type"] == "application/json"


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
async def test_a_row_that_cannot_be_read_is_described(tmp_path: Path, kind: Kind) -> None:
    async with open_world(tmp_path):
        pass  # makes the database
    workspace = "default" if kind.in_workspace else ""
    with contextlib.closing(sqlite3.connect(tmp_path / "nimhost.db")) as db, db:
        row = (kind.key, workspace, "odd", "id-1", 1, 1, "[]", "{}", now(), now())
        db.execute(f"INSERT INTO entities VALUES ({','.join('?' * len(row))})", row)
    async with open_world(tmp_path) as world:  # which compares every reply with the document
        path = kind.path("default")
        (listed,) = [row for row in (await world("GET", path)).json()["data"] if row["name"] == "odd"]
        assert listed["unreadable"].startswith("It cannot be read")
        assert (await world("DELETE", f"{path}/odd")).status_code == kind.delete_code
        assert "odd" not in [row["name"] for row in (await world("GET", path)).json()["data"]]


@pytest.mark.parametrize(
    "text",
    [
        "ab",
        "a",
        "a-b",
        "a--b",
        "ab-",
        "-ab",
        "1x",
        "A.b_c",
        "a_-_b",
        ".ab",
        "a/b",
        "ab\n",
        "",
        "é1",
        "x" * 63,
        "x" * 64,
    ],
)
def test_its_rule_for_names_is_the_one_that_holds(text: str) -> None:
    matches = re.search(NAME["pattern"].replace("$", r"\Z"), text) is not None
    assert (matches and NAME["minLength"] <= len(text) <= NAME["maxLength"]) == is_name(text)


@pytest.mark.timeout(180)
def test_whatever_is_asked_the_reply_is_one_that_it_describes(served: Served, tmp_path: Path) -> None:
    """Schemathesis, on the routes one by one and along the links between them, for a fixed time."""
    program = Path(sys.executable).with_name("st")
    options = {
        "--exclude-tag": "gateway", "--checks": ",".join(CHECKS), "--phases": "fuzzing,stateful", "--seed": "1",
        "--max-time": str(FUZZ_BUDGET_S), "--request-timeout": "10", "--generation-database": "none",
        "--warnings": "off",
    }  # fmt: skip
    config = tmp_path / "schemathesis.toml"
    config.write_text(WORKSPACES)
    assert httpx.post(f"{served.url}/apis/entities/v2/workspaces", json={"name": "second"}).status_code == 201
    done = subprocess.run(
        [program, "--config-file", config, "run", f"{served.url}/openapi.json", "--no-color", "--continue-on-failure",
         *(word for option in options.items() for word in option)],
        capture_output=True, text=True, timeout=FUZZ_BUDGET_S + 100, cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if not key.startswith("PYTEST")},
    )  # fmt: skip
    counts = re.search(r"(\d+) generated.*", done.stdout)
    print(f"\nschemathesis: {counts[0] if counts else 'nothing'}")
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert counts
    assert int(counts[1]) > 100
