"""Looks on while requests are carried: counts them, times them, and writes them into the log when they are over.

Nothing here waits, locks or raises; what it costs is a few microseconds at the end of a request.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from nimhost.errors import NimhostError, status_of
from nimhost.gateway.caller import Caller
from nimhost.gateway.headers import find
from nimhost.gateway.metrics import Metrics, Series
from nimhost.gateway.requestlog import KEPT, KEPT_WITH_BODIES, Record, RequestLog
from nimhost.gateway.routes import Target
from nimhost.gateway.usage import find_usage

CLIENT_LEFT = "client_left"
"""Nobody was there to be answered."""
CUT_OFF = "cut_off"
"""By us: a token that was revoked, or the end of the daemon."""
OUR_FAULT = "internal_error"
"""What should not happen; the log has the traceback."""
UNANSWERED = {CLIENT_LEFT: 499, CUT_OFF: 503, OUR_FAULT: 500}
"""The status of a request that ended so before its reply began; 499 is nginx's word for it."""


class Traffic:
    def __init__(self, *, log_bodies: bool = False) -> None:
        self.metrics = Metrics()
        self.log = RequestLog(KEPT_WITH_BODIES if log_bodies else KEPT)

    def send(self, record: Record, target: Target) -> None:
        """An upstream is asked now; maybe again, if the one before could not be reached."""
        if record.series:
            record.series.in_flight -= 1
        else:
            record.sent_at_s = time.perf_counter()
        record.series = series = self.metrics.series(target)
        series.in_flight += 1

    def cut_off(self, record: Record, cut: asyncio.CancelledError) -> None:
        """The request was cancelled; with an error of ours if its client is told why, in place of a reply."""
        record.error = CUT_OFF
        if cut.args and isinstance(why := cut.args[0], NimhostError):
            record.status, record.reason = status_of(why), why.message

    def end(self, caller: Caller) -> None:
        """The request is over, however that came."""
        record = caller.record
        record.ended_at_s, record.time_s = time.perf_counter(), time.time()
        record.status = status = caller.status or record.status or UNANSWERED.get(record.error, 500)
        if not record.error and status >= 400:
            record.error = f"upstream_{status // 100}xx"
        series = record.series
        if series:
            series.in_flight -= 1
            if caller.first_piece:
                record.usage = find_usage(caller.first_piece, caller.before_last, caller.last_piece)
                record.streamed = _is_stream(caller.reply_headers)
                record.measure_speed()
            _count_reply(series, record)
        _count(series or self.metrics.other, record)
        self.log.add(record)


def _is_stream(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    return (find(headers, b"content-type") or b"").startswith(b"text/event-stream")


def _count(series: Series, record: Record) -> None:
    series.requests[record.status] = series.requests.get(record.status, 0) + 1
    if record.error:
        series.errors[record.error] = series.errors.get(record.error, 0) + 1


def _count_reply(series: Series, record: Record) -> None:
    began_at_s = record.began_at_s
    series.duration_s.add(record.ended_at_s - began_at_s)
    if record.head_at_s:
        series.overhead_s.add(record.overhead_s)
    if record.first_at_s:
        series.first_byte_s.add(record.first_at_s - began_at_s)
    given, made = record.usage
    if given:
        series.prompt_tokens += given
    if made:
        series.completion_tokens += made
    if record.tokens_per_s > 0:
        series.tokens_per_s.add(record.tokens_per_s)
