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
        self._tools: dict[str | int | None, int] = {}
        """The block of every tool call, by its id and by OpenAI's index; of the last one, by None as well."""
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
        function = as_dict(call.get("function"))
        call_id, name, index = as_str(call.get("id")), as_str(function.get("name")), call.get("index")
        index = index if isinstance(index, int) else None
        # Some servers number no calls (or, as Ollama, all alike): there another id begins the next one.
        key = call_id if call_id and (name or index is None) else index
        if key not in self._tools or index not in self._tools:
            self._close_block()
            call_id = call_id or f"{self._id}-{self._blocks}"
            self._block("tool_use", {"id": call_id, "name": name, "input": {}})
            self._tools[call_id] = self._tools[index] = self._tools[None] = self._blocks
        elif self._open != "tool_use" or self._tools[key] != self._blocks:
            raise UpstreamError("The upstream went back to a tool call after it had begun something else.")
        if piece := as_str(function.get("arguments")):
            self._piece({"type": "input_json_delta", "partial_json": piece})

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
