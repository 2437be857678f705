"""Snapshots of progress in, lines out."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest

from nimhost.cli.stages import View, clock, describe, fold, plain_lines
from tests.cli.wire import snapshot

GB = 1_000_000_000


def views(*snapshots: dict[str, Any]) -> list[View]:
    """One second apart."""
    found = [View()]
    for now, one in enumerate(snapshots):
        found.append(fold(found[-1], one, float(now)))
    return found


def bytes_of(done: float, total: float = 0, **more: Any) -> dict[str, Any]:
    return {"done_bytes": int(done), "total_bytes": int(total), "message": "", **more}


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (bytes_of(1.25 * GB, 3.4 * GB), "1.2 of 3.4 GB"),
        (bytes_of(250e6, 3.4 * GB, rate_bytes_s=50e6), "250 MB of 3.4 GB · 50 MB/s · 1:03 left"),
        (bytes_of(250e6, 0, rate_bytes_s=1500), "250 MB · 2 kB/s"),
        (bytes_of(3 * GB, 3 * GB, rate_bytes_s=50e6, message="verifying"), "3.0 of 3.0 GB · 50 MB/s · verifying"),
        ({"message": "no event for 120 s, trying again"}, "no event for 120 s, trying again · 0:00"),
        ({"message": "\x1b[2Jevil", "done_bytes": None, "total_bytes": None}, "evil · 0:00"),
        ({}, "0:00"),
        (bytes_of(999_600_000, 2.5e12), "1.0 GB of 2.50 TB"),
    ],
)
def test_what_a_stage_says(said: dict[str, Any], text: str) -> None:
    (stage,) = views(snapshot("PENDING", weights=said))[-1].stages
    assert describe(stage, 0.0) == text


def test_a_download_that_is_no_longer_reported_is_done() -> None:
    *_, last = views(
        snapshot("PENDING", image=bytes_of(GB, 2 * GB)),
        snapshot("PENDING", image=bytes_of(1.9 * GB, 2 * GB), weights=bytes_of(1)),
        snapshot("PENDING", weights=bytes_of(2)),
    )
    assert [(s.name, describe(s, 9.0)) for s in last.stages] == [
        ("image", "done · 2.0 GB · 0:02"),
        ("weights", "2 B"),
    ]


def test_an_engine_that_comes_and_goes_is_not_done_before_it_is_ready() -> None:
    seen = views(
        snapshot("PENDING", engine={"message": "loading"}),
        snapshot("PENDING"),
        snapshot("PENDING", engine={"message": "x"}),
        snapshot("READY"),
    )
    assert [[s.name for s in view.stages] for view in seen] == [[], ["engine"], [], ["engine"], ["engine"]]
    assert [s.ended_at for s in seen[-1].stages] == [3.0]


def test_lines_that_stay_are_written_on_news_only() -> None:
    seen = views(
        snapshot("PENDING", "Pulling", image=bytes_of(0, 100)),
        snapshot("PENDING", "Pulling", image=bytes_of(4, 100)),
        snapshot("PENDING", "Pulling", image=bytes_of(50, 100)),
        snapshot("PENDING", "Pulling", image=bytes_of(50, 100, message="waiting")),
        snapshot("PENDING", "Starting", engine={"message": ""}),
        snapshot("READY", "Running"),
    )
    lines = [line for before, after in pairwise(seen) for line in plain_lines(before, after, 9.0)]
    assert lines == [
        "image     0 of 100 B",
        "PENDING   Pulling",
        "image     50 of 100 B",
        "image     50 of 100 B · waiting",
        "image     done · 100 B · 0:04",
        "PENDING   Starting",
    ]


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.9, "0:59"), (754, "12:34"), (3723, "1:02:03")])
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text
