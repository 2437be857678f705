"""Token counts out of replies as engines and providers write them."""

from __future__ import annotations

import json

import pytest

from nimhost.gateway.usage import UNKNOWN, find_usage

COUNTS = {
    "prompt_tokens": 12,
    "total_tokens": 132,
    "completion_tokens": 120,
    "prompt_tokens_details": {"cached_tokens": 3},
}
VLLM = {"id": "1", "choices": [{"message": {"content": "x"}}], "usage": COUNTS, "kv_transfer_params": None}
BEGUN = b'{"type":"message_start","message":{"usage":{"input_tokens":25,"output_tokens":1}}}'
START = b"event: message_start\ndata: " + BEGUN + b"\n\n"
DELTA = b'event: message_delta\ndata: {"type":"message_delta","delta":{},"usage":{"output_tokens":15}}\n\n'
USAGE = b'data: {"id":"1","choices":[],"usage":{"prompt_tokens":7,"total_tokens":9,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"
LIES = 'the "usage":{"prompt_tokens":999,"completion_tokens":999}'


@pytest.mark.parametrize(
    ("first", "before_last", "last", "wanted"),
    [
        (b"", b"", json.dumps(VLLM).encode(), (12, 120)),
        (b"", b"", json.dumps(VLLM, indent=2).encode(), (12, 120)),
        (b"", b"", b'{"usage":{"input_tokens":3,"output_tokens":4}}', (3, 4)),
        (b"", b"", b'{"data":[' + b"0.1," * 5000 + b'0],"usage":{"prompt_tokens":5,"total_tokens":5}}', (5, None)),
        (b"data: {}\n\n", USAGE, DONE, (7, 2)),
        (b"data: {}\n\n", USAGE[:40], USAGE[40:] + DONE, (7, 2)),
        (b"data: {}\n\n", b"data: {}\n\n", USAGE + DONE, (7, 2)),
        (START, DELTA, b'event: message_stop\ndata: {"type":"message_stop"}\n\n', (25, 15)),
        (b"", b"", b'{"choices":[]}', UNKNOWN),
        (b"", b"", b'{"usage":null}', UNKNOWN),
        (b"", b"", json.dumps({"choices": [{"message": {"content": LIES}}]}).encode(), UNKNOWN),
        (b"", b"", json.dumps({"content": LIES, "usage": COUNTS}).encode(), (12, 120)),
        (b"", b"", b'{"usage":{"prompt_tokens":' + b"9" * 400 + b"}}", UNKNOWN),
        (b"", b"", b"\x1f\x8b\x08\x00 compressed", UNKNOWN),
        (b"", b"", b"", UNKNOWN),
    ],
    ids=["openai", "indented", "anthropic", "embeddings", "stream", "cut-in-two", "in-one-piece", "anthropic-stream",
         "none", "null", "in-the-text", "in-the-text-too", "no-number", "compressed", "empty"],
)  # fmt: skip
def test_usage_is_found_where_the_reply_has_it(
    first: bytes, before_last: bytes, last: bytes, wanted: tuple[int | None, int | None]
) -> None:
    assert find_usage(first, before_last, last) == wanted
