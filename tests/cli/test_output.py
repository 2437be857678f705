"""Tables, YAML, ages, and what must not reach a terminal."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
import yaml

from nimhost.cli.output import age, clean, print_table
from nimhost.cli.structures import to_yaml

NOW = datetime(2026, 1, 2, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    "value",
    [
        {"a": 1, "b": [1, {"c": None, "d": [[1], []]}], "e": {}},
        [{"name": "x", "tags": ["a", "b"]}, "y"],
        {"text": "two\nlines: 'quoted' \"too\" \\ # no comment", "emoji": "😀\n", "control": "\x1b\x7f\x85\u2028"},
        [
            "no",
            "Null",
            "1.5",
            "~",
            "- x",
            "a: b",
            " pad ",
            "",
            "yes/no",
            "0x10",
            "2026-01-02",
            "true",
            "1e3",
            "=",
            "<<",
        ],
        "plain",
        [],
        {"1": True, "on": 1.5},
    ],
)
def test_yaml_reads_back_as_it_was(value: Any) -> None:
    assert yaml.safe_load(to_yaml(value)) == value


@pytest.mark.parametrize(
    ("created_at", "text"),
    [
        ("2026-01-02T11:59:18Z", "42s"),
        ("2026-01-02T11:59:18.123456", "41s"),
        ("2026-01-02T11:58:01Z", "119s"),
        ("2026-01-02T11:50:00+00:00", "10m"),
        ("2026-01-02T10:00:00Z", "2h"),
        ("2025-12-31T00:00:00Z", "2d"),
        ("2026-01-03T00:00:00Z", "0s"),
    ],
)
def test_age(created_at: str, text: str) -> None:
    assert age(created_at, NOW) == text


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("plain\n\ttext größe 😀", "plain\n\ttext größe 😀"),
        ("\x1b[31mred\x1b[0m", "red"),
        ("\x1b]0;title\x07x\x1b]52;c;aGk=\x1b\\y", "xy"),
        ("a\x9b31mb\x00\r\x08", "a31mb"),
    ],
)
def test_what_steers_a_terminal_is_left_out(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


def test_a_table_that_is_piped_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("NAME", "MESSAGE"), [("a", "x" * 300), ("longer", "two\nlines")])
    assert capsys.readouterr().out == f"NAME    MESSAGE\na       {'x' * 300}\nlonger  two lines\n"


def test_columns_stand_below_each_other_where_characters_are_wide(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("PATH", "SIZE"), [("日本語.txt", "1"), ("größe😀", "22"), ("plain.txt", "333")])
    assert capsys.readouterr().out == "PATH        SIZE\n日本語.txt  1\ngröße😀     22\nplain.txt   333\n"
