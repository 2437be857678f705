"""Decoders: the same result wherever the bytes are cut."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nimhost.client.streams import Chunks, Decoder, Records, Text
from nimhost.errors import UpstreamError

SEPARATOR = "\u2028"  # a line break for str.splitlines, a plain character for JSON


def decode(decoder: Decoder, *pieces: bytes) -> list[Any]:
    return [item for piece in pieces for item in decoder.feed(piece)] + decoder.end()


def test_text_may_be_cut_anywhere() -> None:
    whole = "größer 😀".encode()
    for cut in range(len(whole) + 1):
        assert "".join(decode(Text(""), whole[:cut], whole[cut:])) == "größer 😀"


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_events_may_be_cut_anywhere(newline: str) -> None:
    said = {"a": f"ä{SEPARATOR}b"}
    whole = f": hello\n\ndata: {json.dumps(said, ensure_ascii=False)}\nid: 1\n\ndata:{{}}\n\n".replace(
        "\n", newline
    ).encode()
    for cut in range(len(whole) + 1):
        assert decode(Records(""), whole[:cut], whole[cut:]) == [said, {}]


def test_named_events_and_the_end_mark_are_no_chunks() -> None:
    stream = b'event: ping\ndata: {}\n\ndata: {"choices": []}\n\ndata: [DONE]\n\n'
    assert decode(Chunks("text/event-stream"), stream) == [{"choices": []}]


@pytest.mark.parametrize(
    "stream",
    [
        b'event: error\ndata: {"message": "out of memory"}\n\n',
        b"event: error\ndata: out of memory\n\n",
        b'data: {"error": {"message": "out of memory", "code": 500}}\n\n',
        b'data: {"error": "out of memory"}\n\n',
    ],
)
def test_an_error_inside_the_stream_is_raised(stream: bytes) -> None:
    with pytest.raises(UpstreamError, match="out of memory") as caught:
        decode(Chunks("text/event-stream"), stream)
    assert caught.value.message == "out of memory"


def test_an_answer_that_does_not_stream_is_one_chunk() -> None:
    whole = json.dumps({"model": "m", "choices": [{"message": {"role": "assistant", "content": "Hi"}}]}).encode()
    (chunk,) = decode(Chunks("application/json; charset=utf-8"), whole[:9], whole[9:])
    assert (chunk.model, chunk.choices[0].delta["content"]) == ("m", "Hi")


@pytest.mark.parametrize("data", ["[1]", "{", "null"])
def test_what_is_no_object_is_named(data: str) -> None:
    with pytest.raises(UpstreamError, match="Expected a JSON object"):
        decode(Records(""), f"data: {data}\n\n".encode())
