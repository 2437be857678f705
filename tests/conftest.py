"""Prints which of the known faults the tests inject: `pytest -m fault`. A row without a test shows."""

from __future__ import annotations

import pytest

FAULTS = (
    "image pull hangs, no progress",
    "retrying what cannot work (401, 404, no space)",
    "create works, start fails, the retry reports 409",
    "orphans after a crash or after a delete during an error",
    "the cleaner kills somebody else's container (second daemon, fresh or restored database)",
    "GPU claims lost on restart → double booking",
    "two deployments see the same free GPU or port",
    "container gone, VRAM still held",
    "GPU vanishes inside a running container after a host daemon-reload",
    "no NVIDIA runtime",
    "driver too old for the image",
    "64 MB /dev/shm",
    "ulimits the host refuses",
    "hub answers 429, or is down",
    "stale download lock",
    "partial snapshot taken for complete",
    "disk full, in the middle",
    "download killed at 99 %",
    "engine reachable from the LAN, past the firewall",
    "daemon killed (-9) at any stage of a deploy",
    "Docker restarts, its socket goes away, its event stream breaks",
    "crash loop holds the GPU",
    "engine out of memory at start",
    "health says yes, model is not there",
    "client leaves, GPU keeps generating",
    "stream cut by idle proxies during a long prefill",
    "upstream dies mid-stream",
    "upstream accepts and never answers",
    "secrets in logs, errors, status messages, `inspect`, process arguments, database, backups",
    "key file readable by others",
    "accounting backs up memory",
    "LoRA forgotten after an engine restart",
    "control endpoints of engines reachable through the gateway",
    "model name used as a path (`../x`, `/abs`)",
    "DNS rebinding or a web page posting to localhost",
    "a token-less daemon bound to 0.0.0.0",
    "path traversal in filesets (`..`, absolute, symlink, encoded)",
    "database locked, corrupt, disk full, from a newer version",
    "two daemons on one data directory",
    "huge or endless request bodies, slow clients, 10,000 idle connections",
)
"""How daemons that drive Docker for model serving are known to fail; `@pytest.mark.fault(17)` is the 17th."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    tests: dict[int, int] = {}
    for item in items:
        for mark in item.iter_markers("fault"):
            for row in mark.args:
                tests[row] = tests.get(row, 0) + 1
    config.stash[_TESTS] = tests


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if "fault" not in config.option.markexpr:
        return
    terminalreporter.section("faults and the tests that inject them")
    for row, fault in enumerate(FAULTS, 1):
        count = config.stash[_TESTS].get(row, 0)
        terminalreporter.line(f"{row:3} {count or 'NONE':>4}  {fault}")


_TESTS = pytest.StashKey[dict[int, int]]()
