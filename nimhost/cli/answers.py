"""An answer as it comes: chunks of a chat completion in, pieces of text out, thinking apart from saying. Pure."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple


class Piece(NamedTuple):
    kind: Literal["content", "thinking"]
    text: str


OPEN, CLOSE = "<think>", "</think>"


class Splitter:
    """Tells thinking (`<think>…</think>` at the start of an answer) from content, wherever the text is cut."""

    def __init__(self) -> None:
        self._state: Literal["start", "thinking", "gap", "content"] = "start"
        self._rest = ""

    def feed(self, text: str) -> list[Piece]:
        self._rest += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return [piece for piece in pieces if piece.text]

    def end(self) -> list[Piece]:
        kind: Literal["content", "thinking"] = "thinking" if self._state == "thinking" else "content"
        rest, self._rest = self._rest, ""
        return [Piece(kind, rest)] if rest else []

    def _step(self, pieces: list[Piece]) -> bool:
        """Take what can be decided; whether there may be more."""
        if self._state == "start":
            return self._at_start()
        if self._state == "thinking":
            return self._thinking(pieces)
        if self._state == "gap":
            self._rest = self._rest.lstrip()
            self._state = "content" if self._rest else "gap"
            return bool(self._rest)
        pieces.append(Piece("content", self._rest))
        self._rest = ""
        return False

    def _at_start(self) -> bool:
        begin = self._rest.lstrip()
        if begin.startswith(OPEN):
            self._state, self._rest = "thinking", begin.removeprefix(OPEN)
            return True
        if OPEN.startswith(begin):
            return False
        self._state = "content"
        return True

    def _thinking(self, pieces: list[Piece]) -> bool:
        thought, close, rest = self._rest.partition(CLOSE)
        if close:
            pieces.append(Piece("thinking", thought))
            self._state, self._rest = "gap", rest
            return True
        keep = next((n for n in range(len(CLOSE) - 1, 0, -1) if thought.endswith(CLOSE[:n])), 0)
        pieces.append(Piece("thinking", thought[: len(thought) - keep]))
        self._rest = thought[len(thought) - keep :]
        return False


class Answer:
    """Everything that one answer consisted of."""

    def __init__(self) -> None:
        self.content = ""
        self.thinking = ""
        self.model: str | None = None
        self.usage: Any = None
        self._splitter = Splitter()

    def feed(self, chunk: Any) -> list[Piece]:
        self.model = chunk.get("model") or self.model
        self.usage = chunk.get("usage") or self.usage
        pieces: list[Piece] = []
        for choice in (chunk.get("choices") or [])[:1]:
            delta = choice.get("delta") or {}
            thought = delta.get("reasoning_content") or delta.get("reasoning")
            if isinstance(thought, str):
                pieces.append(Piece("thinking", thought))
            if isinstance(delta.get("content"), str):
                pieces += self._splitter.feed(delta["content"])
        return self._keep(pieces)

    def end(self) -> list[Piece]:
        return self._keep(self._splitter.end())

    def _keep(self, pieces: list[Piece]) -> list[Piece]:
        for piece in pieces:
            if piece.kind == "thinking":
                self.thinking += piece.text
            else:
                self.content += piece.text
        return pieces

    def result(self, asked: str) -> dict[str, Any]:
        return {"content": self.content, "thinking": self.thinking, "model": self.model or asked, "usage": self.usage}
