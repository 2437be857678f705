"""A stream of OpenAI's chunks as a stream of Anthropic's events. Pure."""

from __future__ import annotations

from nimhost.errors import UpstreamError
from nimhost.gateway.translate.errors import anthropic_error, message_of_error
from nimhost.gateway.translate.fields import Json, as_dict, as_dicts, as_str
from nimhost.gateway.translate.replies import message_usage_of, stop_of
from nimhost.gateway.translate.streams import Stream, encode, read_event


class MessageStream(Stream):
    """One block is open at a time, as in Anthropic's own streams. OpenAI tells the usage last: so do we, and
    `message_start` counts nothing unless the upstream already did.
    """

    def __init__(self) -> None:
        super().__init__()
        self._id = ""
        self._begun = False
        self._blocks = 0
        self._open: str | None = None
        """The kind of the block that is open."""
        self._tool = 0
        """OpenAI's index of the tool call that is open, or was the last."""
        self._tools: set[int] = set()
        self._choice: Json | None = None
        """The one that said how the answer ended."""
        self._usage: Json = {}

    def _take(self, data: bytes) -> None:
        if data.strip() == b"[DONE]":
            self._finish()
            return
        chunk = read_event(data)
        if chunk.get("error"):
            message, _ = message_of_error(chunk["error"])
            status = as_dict(chunk["error"]).get("code")
            error = anthropic_error(status if isinstance(status, int) else 500, message or "The upstream failed.")
            self._write("error", error)
            self.ended = True
            return
        self._usage |= as_dict(chunk.get("usage"))
        if not self._begun:
            self._begin(chunk)
        for choice in as_dicts(chunk.get("choices"))[:1]:
            self._delta(as_dict(choice.get("delta")))
            if choice.get("finish_reason"):
                self._choice = choice

    def _finish(self) -> None:
        if self._choice is None:
            super()._finish()
            return
        self._close_block()
        stop = stop_of(self._choice, called=bool(self._tools))
        self._write("message_delta", {"delta": stop, "usage": message_usage_of(self._usage)})
        self._write("message_stop", {})
        self.ended = True

    def _begin(self, chunk: Json) -> None:
        self._begun, self._id = True, as_str(chunk.get("id"))
        message: Json = {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": as_str(chunk.get("model")),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": message_usage_of(self._usage),
        }
        self._write("message_start", {"message": message})

    def _delta(self, delta: Json) -> None:
        if thought := as_str(delta.get("reasoning_content")) or as_str(delta.get("reasoning")):
            self._block("thinking", {"thinking": "", "signature": ""})
            self._piece({"type": "thinking_delta", "thinking": thought})
        for text in (as_str(delta.get("content")), as_str(delta.get("refusal"))):
            if text:
                self._block("text", {"text": ""})
                self._piece({"type": "text_delta", "text": text})
        for call in as_dicts(delta.get("tool_calls")):
            self._call(call)

    def _call(self, call: Json) -> None:
        index, function = self._index(call), as_dict(call.get("function"))
        if index not in self._tools:
            self._close_block()
            self._tools.add(index)
            self._tool = index
            name = as_str(function.get("name"))
            call_id = as_str(call.get("id")) or f"{self._id}-{index}"
            self._block("tool_use", {"id": call_id, "name": name, "input": {}})
        elif self._open != "tool_use" or index != self._tool:
            raise UpstreamError("The upstream went back to a tool call after it had begun something else.")
        if piece := as_str(function.get("arguments")):
            self._piece({"type": "input_json_delta", "partial_json": piece})

    def _index(self, call: Json) -> int:
        """Some servers count no calls: then an id begins the next one."""
        index = call.get("index")
        if isinstance(index, int):
            return index
        return len(self._tools) if call.get("id") or not self._tools else self._tool

    # --- out

    def _block(self, kind: str, fields: Json) -> None:
        """The next piece belongs to a block of this kind."""
        if self._open == kind:
            return
        self._close_block()
        self._open = kind
        self._write("content_block_start", {"index": self._blocks, "content_block": {"type": kind, **fields}})

    def _close_block(self) -> None:
        if self._open:
            self._write("content_block_stop", {"index": self._blocks})
            self._blocks += 1
            self._open = None

    def _piece(self, delta: Json) -> None:
        self._write("content_block_delta", {"index": self._blocks, "delta": delta})

    def _write(self, kind: str, fields: Json) -> None:
        self._out.append(b"event: %b\ndata: %b\n\n" % (kind.encode(), encode({"type": kind, **fields})))
