"""Metrics and the request log of a real daemon, asked with the command line and as a scraper would."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.daemon import MODELS, DaemonProcess
from tests.e2e.test_access_e2e import bearer, make_token, new_daemon, run
from tests.support import wait_until

ASK = {"model": "default/gpt-4", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def daemon(tmp_path: Path, provider: str) -> Iterator[DaemonProcess]:
    daemon = new_daemon(tmp_path, "127.0.0.1")
    daemon.start()
    daemon.post(f"{MODELS}/providers", {"name": "ext", "host_url": provider})
    wait_until(lambda: daemon.http.post("/v1/chat/completions", json=ASK).status_code == 200, 20)
    yield daemon
    daemon.close()


def test_requests_are_shown_with_what_they_took_and_why_they_failed(daemon: DaemonProcess) -> None:
    reply = daemon.http.post("/v1/chat/completions", json=ASK, headers={"x-request-id": "first-of-mine"})
    daemon.http.post("/v1/chat/completions", json={"model": "default/gpt-5"}, headers={"x-request-id": "wrong"})
    usage = reply.json()["usage"]
    table = wait_until(lambda: (out := run(daemon, "requests").stdout) and "wrong" in out and out, 10)
    assert isinstance(table, str)
    head, *rows = table.splitlines()
    assert head.split()[:5] == ["TIME", "STATUS", "PATH", "MODEL", "PROVIDER"]
    fine, wrong = (next(row for row in rows if id in row) for id in ("first-of-mine", "wrong"))
    assert "default/gpt-4" in fine
    assert "default/ext" in fine
    assert f"{usage['prompt_tokens']} > {usage['completion_tokens']}" in fine
    assert wrong.split()[1:4] == ["404", "v1/chat/completions", "default/gpt-5"]
    assert wrong.endswith("not_found: Model entity not found for default/gpt-5")
    failed = json.loads(run(daemon, "requests", "--failed", "--model", "gpt-5", "-f", "json").stdout)
    assert [one["id"] for one in failed] == ["wrong"]
    assert "There were no such requests." in run(daemon, "requests", "--provider", "nobody").stdout
    assert "There were no such requests." in run(daemon, "requests", "-w", "nope").stdout
    assert "first-of-mine" in run(daemon, "requests", "-w", "default").stdout


def test_a_chat_is_shown_by_its_model_and_its_tokens(daemon: DaemonProcess) -> None:
    assert run(daemon, "chat", "gpt-4", "Hello!", "--provider", "ext").returncode == 0
    command = ("requests", "-n", "1", "-f", "json")
    (one,) = wait_until(lambda: [o for o in json.loads(run(daemon, *command).stdout) if "/provider/" in o["path"]], 10)
    assert (one["model"], one["provider"], one["streamed"]) == ("default/gpt-4", "default/ext", True)
    assert one["completion_tokens"]


def test_following_shows_each_request_as_it_ends(daemon: DaemonProcess) -> None:
    with _following(daemon, "-n", "0", "-f", "json") as following:
        assert following.stdout
        try:
            wait_until(lambda: daemon.http.get("/apis/nimhost/v1/requests").json()["data"], 10)
            for name in ("one", "two"):
                # It may not listen yet: asked again until it shows.
                wait_until(lambda name=name: _asked_and_seen(daemon, following, name), 20)
        finally:
            following.terminate()


def _following(daemon: DaemonProcess, *options: str) -> subprocess.Popen[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("NIMHOST_", "NMP_"))}
    command = [sys.executable, "-m", "nimhost", "--base-url", daemon.url, "requests", "--follow", *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=inherited)


def _asked_and_seen(daemon: DaemonProcess, following: subprocess.Popen[str], name: str) -> bool:
    daemon.http.post("/v1/chat/completions", json=ASK, headers={"x-request-id": name})
    assert following.stdout
    if not select.select([following.stdout], [], [], 0.5)[0]:
        return False
    return bool(json.loads(following.stdout.readline())["id"] == name)


def test_a_follower_does_not_hold_up_the_end_of_the_daemon(daemon: DaemonProcess) -> None:
    daemon.http.post("/v1/chat/completions", json=ASK)
    with daemon.http.stream("GET", "/apis/nimhost/v1/requests?follow=true", timeout=60) as reply:
        pieces = reply.iter_bytes()
        assert b"data: " in next(pieces)
        begun = time.monotonic()
        assert daemon.stop() == 0
        assert time.monotonic() - begun < 15, "it waits 30 s for replies that end"
        list(pieces)  # they come to an end, and not to an error
    assert "ERROR" not in daemon.log.read_text()


def test_whoever_follows_is_told_in_a_line_that_the_daemon_stopped(daemon: DaemonProcess) -> None:
    with _following(daemon, "-n", "1") as following:
        assert following.stdout
        assert "TIME" in following.stdout.readline()
        assert "gpt-4" in following.stdout.readline()
        assert daemon.stop() == 0
        rest, said = following.communicate(timeout=20)
    assert (following.returncode, rest) == (1, "")
    assert said.splitlines()[0] == f"Error: nimhost at {daemon.url} has stopped."
    assert "Traceback" not in said


@pytest.mark.fault(36)
def test_metrics_and_requests_take_the_right_to_read(tmp_path: Path, provider: str) -> None:
    daemon = new_daemon(tmp_path, "0.0.0.0")
    try:
        admin = make_token(daemon, "root", "admin")
        daemon.start()
        reader, talker = (make_token(daemon, scope, scope, admin) for scope in ("read", "inference"))
        for path in ("/metrics", "/apis/nimhost/v1/requests"):
            codes = [
                httpx.get(f"{daemon.url}{path}", headers=headers, trust_env=False).status_code
                for headers in ({}, bearer(talker), bearer(reader), bearer(admin))
            ]
            assert codes == [401, 403, 200, 200], path
    finally:
        daemon.close()
