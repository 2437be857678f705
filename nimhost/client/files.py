"""Filesets, and the files in them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from nimhost.client.resource import Resource, call
from nimhost.client.streams import Bytes
from nimhost.client.wire import Flow, Request


class Filesets(Resource):
    @call
    def list_files(self, name: str, path: str = "", *, workspace: str | None = None) -> Flow[Any]:
        """Records with `path` and `size`, of all files or of those under `path`."""
        query = {"path": path} if path else {}
        return (yield Request(path=self._path(name, workspace, "files"), query=query))["data"]

    @call
    def upload(
        self,
        name: str,
        path: str,
        source: str,
        *,
        workspace: str | None = None,
        on_sent: Callable[[int], None] | None = None,
    ) -> Flow[Any]:
        """Store the local file `source` as `path`, replacing what is there. Raises BadRequest if it cannot be read.

        `on_sent` is told how many bytes are on their way, each time that there are more.
        """
        where = self._path(name, workspace, "-", path)
        return (yield Request(method="PUT", path=where, upload=source, on_sent=on_sent))

    def download(self, name: str, path: str, *, workspace: str | None = None) -> Any:
        """An iterator over the bytes of a file."""
        return self.wire.stream(Request(path=self._path(name, workspace, "-", path), quiet_s=math.inf), Bytes)

    @call
    def delete_file(self, name: str, path: str, *, workspace: str | None = None) -> Flow[Any]:
        return (yield Request(method="DELETE", path=self._path(name, workspace, "-", path)))
