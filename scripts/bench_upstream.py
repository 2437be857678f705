"""The engine of `scripts/bench gateway`: answers at once, costs next to nothing. Argument: PORT.

A stream has as many chunks as its request says in `max_tokens`, `pause_ms` apart.
"""

from __future__ import annotations

import asyncio
import json
import sys
from functools import lru_cache

import uvloop

REPLY_BODY = (
    b'{"id":"chatcmpl-bench","object":"chat.completion","created":1700000000,"model":"bench-served","choices":'
    b'[{"index":0,"message":{"role":"assistant","content":"' + b"All work and no play. " * 20 + b'"},'
    b'"logprobs":null,"finish_reason":"stop"}],"usage":{"prompt_tokens":12,"completion_tokens":120,"total_tokens":132}}'
)
REPLY = b"HTTP/1.1 200 OK\r\nserver: bench\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (
    len(REPLY_BODY),
    REPLY_BODY,
)
STREAM_HEAD = (
    b"HTTP/1.1 200 OK\r\nserver: bench\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
)


def frame(number: int) -> bytes:
    """One event of a stream, as vLLM writes it."""
    return (
        b'data: {"id":"chatcmpl-bench","object":"chat.completion.chunk","created":1700000000,"model":"bench-served",'
        b'"choices":[{"index":0,"delta":{"content":" word%d"},"logprobs":null,"finish_reason":null}]}\n\n' % number
    )


def frames(count: int) -> list[bytes]:
    return [*map(frame, range(count)), b"data: [DONE]\n\n"]


@lru_cache
def chunks_of(count: int) -> list[bytes]:
    chunks = [b"%x\r\n%b\r\n" % (len(data), data) for data in frames(count)]
    chunks[-1] += b"0\r\n\r\n"
    return chunks


class Engine(asyncio.Protocol):
    transport: asyncio.Transport

    def __init__(self) -> None:
        self.received = b""
        self.chunks: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's is none by inheritance

    def data_received(self, data: bytes) -> None:
        self.received += data
        while (end := self.received.find(b"\r\n\r\n") + 4) > 3:
            length = self.received[:end].lower().partition(b"content-length:")[2]
            size = int(length.partition(b"\r\n")[0] or 0)
            if len(self.received) < end + size:
                return
            body, self.received = self.received[end : end + size], self.received[end + size :]
            self.answer(body)

    def answer(self, body: bytes) -> None:
        if b'"stream":true' not in body:
            self.transport.write(REPLY)
            return
        order = json.loads(body)
        self.chunks, self.pause_s = chunks_of(order["max_tokens"]), order["pause_ms"] / 1000
        self.transport.write(STREAM_HEAD)
        self.write_chunk(0)

    def write_chunk(self, number: int) -> None:
        if self.transport.is_closing():
            return
        self.transport.write(self.chunks[number])
        if number + 1 < len(self.chunks):
            asyncio.get_running_loop().call_later(self.pause_s, self.write_chunk, number + 1)


async def main(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(Engine, "127.0.0.1", port, backlog=2048)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1])))
