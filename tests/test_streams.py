"""What is written for readers that come late, or never."""

from __future__ import annotations

import os

import pytest

from nimhost import streams
from nimhost.streams import Lines


def test_lines_come_in_order_and_those_that_were_dropped_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streams, "WAITING_LINES", 3)
    monkeypatch.setattr(streams, "FLUSH_S", 0.1)
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb") as reader:
        lines = Lines(writing)
        big = "x" * 1_000_000  # more than a pipe holds: the writer hangs in it
        lines.put(big)
        assert reader.read(10) == b"x" * 10
        for number in range(5):
            lines.put(str(number))
        lines.flush()  # gives up
        assert reader.read(len(big) - 9) == b"x" * (len(big) - 10) + b"\n"
        assert reader.readline() == b"0\n"
        assert reader.readline() == b"(2 lines were dropped: nobody read them in time)\n"
        assert [reader.readline() for _ in range(2)] == [b"1\n", b"2\n"]
        monkeypatch.setattr(streams, "FLUSH_S", 10)
        lines.flush()
    os.close(writing)
