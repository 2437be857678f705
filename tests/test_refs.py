from __future__ import annotations

import pytest

from nimhost.errors import InvalidRequest
from nimhost.refs import Ref, adapter_served_name, is_name, parse_ref, slug


@pytest.mark.parametrize("name", ["ab", "a1", "Llama-3.1-8b", "9a", "a_b.c-d", "x" * 63])
def test_names(name: str) -> None:
    assert is_name(name)


@pytest.mark.parametrize(
    "name",
    ["", "a", "x" * 64, "a--b", "ab-", "-ab", ".ab", "..", "a/b", "a b", "a\n", "ab\n", "é1", "a%2fb", "../x", "/abs"],
)
@pytest.mark.fault(34)
def test_what_is_no_name(name: str) -> None:
    assert not is_name(name)


@pytest.mark.parametrize(("text", "ref"), [("name", Ref("here", "name")), ("ws/name", Ref("ws", "name"))])
def test_references(text: str, ref: Ref) -> None:
    assert parse_ref(text, "here") == ref


@pytest.mark.parametrize("text", ["", "/", "ws/", "/name", "ws/a/b", "ws/../x"])
def test_what_is_no_reference_names_the_field(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse_ref(text, "here", "fileset")
    assert caught.value.problems[0]["loc"] == ["body", "fileset"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("meta/llama-3.2-1b-instruct", "meta-llama-3-2-1b-instruct"),
        ("model:v1.0", "model-v1-0"),
        ("01-ai/yi-large", "m-01-ai-yi-large"),
        ("default/own", "own"),
        ("Qwen/Qwen3-1.7B", "qwen-qwen3-1-7b"),
    ],
)
def test_slugs(text: str, expected: str) -> None:
    assert slug(text, "default") == expected


def test_a_long_id_keeps_a_hash_of_the_original() -> None:
    long = slug("a" * 100)
    assert len(long) == 63
    assert long != slug("a" * 101)
    assert is_name(long)


def test_adapters_are_served_under_a_name_that_can_be_taken_apart() -> None:
    assert adapter_served_name(Ref("ws", "name")) == "ws--name"
