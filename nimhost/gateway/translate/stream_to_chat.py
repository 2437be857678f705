"""A stream of Anthropic's events as a stream of OpenAI's chunks. Pure."""

from __future__ import annotations

from nimhost.gateway.translate.errors import message_of_error, openai_error
from nimhost.gateway.translate.fields import Json, as_dict, as_int, as_str, write_arguments
from nimhost.gateway.translate.replies import completion_usage_of, finish_reason_of
from nimhost.gateway.translate.streams import Stream, encode, read_event


class Block:
    """A block of the answer that is being written."""

    def __init__(self, start: Json, tool_number: int) -> None:
        self.start = start
        self.kind = start.get("type")
        self.tool_number = tool_number
        self.thought: list[str] = [as_str(start.get("thinking"))]
        self.signature = as_str(start.get("signature"))
        self.wrote = False
        """Some of its arguments went out."""


class ChatStream(Stream):
    """`created_s`: the time, which OpenAI's chunks carry. `with_usage`: the client asked for it
    (`stream_options.include_usage`).
    """

    def __init__(self, created_s: int, *, with_usage: bool) -> None:
        super().__init__()
        self._frame: Json = {"id": "", "object": "chat.completion.chunk", "created": created_s, "model": ""}
        self._with_usage = with_usage
        self._usage: Json = {}
        self._blocks: dict[int, Block] = {}
        self._tools = self._thoughts = 0
        """So many of each there were."""
        self._finished = False

    def _take(self, data: bytes) -> None:
        event = read_event(data)
        kind = event.get("type")
        if kind == "content_block_delta":
            self._delta(self._block(event), as_dict(event.get("delta")))
        elif kind == "content_block_start":
            self._start(event)
        elif kind == "content_block_stop":
            self._stop(self._block(event))
        elif kind == "message_start":
            message = as_dict(event.get("message"))
            self._frame |= {name: as_str(message.get(name)) for name in ("id", "model")}
            self._usage |= as_dict(message.get("usage"))
            self._chunk({"role": "assistant", "content": ""})
        elif kind == "message_delta":
            self._usage |= {name: value for name, value in as_dict(event.get("usage")).items() if value is not None}
            if reason := as_dict(event.get("delta")).get("stop_reason"):
                self._chunk({}, finish_reason_of(reason))
                self._finished = True
        elif kind == "message_stop":
            self._end()
        elif kind == "ping":
            self._out.append(b": ping\n\n")
        elif kind == "error":
            message_text, code = message_of_error(event.get("error"))
            self._write(openai_error(500, message_text or "The upstream failed.", code))
            self.ended = True

    def _finish(self) -> None:
        if self._finished:
            self._end()
        else:
            super()._finish()

    def _end(self) -> None:
        if self._with_usage:
            self._write({**self._frame, "choices": [], "usage": completion_usage_of(self._usage)})
        self._out.append(b"data: [DONE]\n\n")
        self.ended = True

    # --- blocks

    def _block(self, event: Json) -> Block:
        return self._blocks.get(as_int(event.get("index"))) or Block({}, 0)

    def _start(self, event: Json) -> None:
        start = as_dict(event.get("content_block"))
        block = self._blocks[as_int(event.get("index"))] = Block(start, self._tools)
        if block.kind == "tool_use":
            self._tools += 1
            function = {"name": as_str(start.get("name")), "arguments": ""}
            self._call(block, {"id": as_str(start.get("id")), "type": "function", "function": function})
        elif block.kind == "text" and start.get("text"):
            self._chunk({"content": start["text"]})
        elif block.kind == "thinking" and start.get("thinking"):
            self._chunk({"reasoning_content": start["thinking"]})

    def _delta(self, block: Block, delta: Json) -> None:
        kind = delta.get("type")
        if kind == "text_delta":
            self._chunk({"content": as_str(delta.get("text"))})
        elif kind == "input_json_delta":
            if block.kind == "tool_use" and (piece := as_str(delta.get("partial_json"))):
                block.wrote = True
                self._call(block, {"function": {"arguments": piece}})
        elif kind == "thinking_delta":
            block.thought.append(as_str(delta.get("thinking")))
            self._chunk({"reasoning_content": block.thought[-1]})
        elif kind == "signature_delta":
            block.signature += as_str(delta.get("signature"))

    def _stop(self, block: Block) -> None:
        if block.kind == "tool_use" and not block.wrote:
            self._call(block, {"function": {"arguments": write_arguments(as_dict(block.start.get("input")))}})
        elif block.kind in ("thinking", "redacted_thinking"):
            thought: Json = dict(block.start)
            if block.kind == "thinking":
                thought |= {"thinking": "".join(block.thought), "signature": block.signature}
            self._chunk({"thinking_blocks": [{"index": self._thoughts, **thought}]})
            self._thoughts += 1

    # --- out

    def _call(self, block: Block, fields: Json) -> None:
        self._chunk({"tool_calls": [{"index": block.tool_number, **fields}]})

    def _chunk(self, delta: Json, finish_reason: str | None = None) -> None:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        self._write({**self._frame, "choices": [choice]} | ({"usage": None} if self._with_usage else {}))

    def _write(self, chunk: Json) -> None:
        self._out.append(b"data: %b\n\n" % encode(chunk))
