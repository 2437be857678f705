"""Replies of others than nimhost: what the client makes of them."""

from __future__ import annotations

import pytest

from nimhost import errors
from nimhost.client.wire import Record, decode

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("status", "body", "cls", "message"),
    [
        (404, b'{"detail":"Not Found"}', errors.NotFound, "Not Found"),
        (409, b'{"detail":"exists"}', errors.Conflict, "exists"),
        (400, b'{"error":{"message":"bad","hint":"better"}}', errors.BadRequest, "bad"),
        (500, b'{"message":"oops"}', errors.NimhostError, "oops"),
        (418, b"teapot", errors.NimhostError, "The server answered 418 without a reason."),
        (404, b"<html>nginx</html>", errors.NotFound, "The server answered 404 without a reason."),
        (301, b"", errors.NimhostError, "The server answered 301 without a reason."),
        (
            422,
            b'{"detail":[{"loc":["body","name"],"msg":"Field required"}]}',
            errors.InvalidRequest,
            "name: Field required",
        ),
    ],
)
def test_a_status_without_a_class_is_the_plainest_error(
    status: int, body: bytes, cls: type[errors.NimhostError], message: str
) -> None:
    with pytest.raises(errors.NimhostError) as caught:
        decode(status, JSON, body)
    assert type(caught.value) is cls
    assert caught.value.message == message


def test_another_server_at_the_address_is_suspected() -> None:
    with pytest.raises(errors.NotFound) as caught:
        decode(404, {"content-type": "text/html"}, b"<html>")
    assert "--base-url" in (caught.value.hint or "")
    with pytest.raises(errors.UpstreamError, match="text/html") as wrong:
        decode(200, {"content-type": "text/html"}, b"<html>")
    assert "--base-url" in (wrong.value.hint or "")


def test_retry_after_is_kept() -> None:
    with pytest.raises(errors.NotReady) as caught:
        decode(503, {"retry-after": "17", errors.ERROR_HEADER: "NotReady"}, b'{"detail":"loading"}')
    assert caught.value.retry_after_s == 17


def test_records_read_like_objects_all_the_way_down() -> None:
    record = decode(200, JSON, b'{"a":[{"b":{"c":1}}]}')
    assert record.a[0].b.c == 1
    assert record == {"a": [{"b": {"c": 1}}]}
    with pytest.raises(AttributeError, match="no 'd' in this Record"):
        Record(a=1).d  # noqa: B018
