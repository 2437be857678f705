"""What `deploy` shows of a deployment on its way: snapshots of progress in, lines out. Pure."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from nimhost.cli.output import clean

NAMES = ("image", "weights", "engine")


class Stage(Struct, frozen=True, kw_only=True):
    """One of NAMES, from when it was first heard of; `ended_at` is when it was no longer (monotonic seconds)."""

    name: str
    message: str = ""
    done_bytes: int = 0
    total_bytes: int = 0
    rate_bytes_s: float = 0.0
    started_at: float
    ended_at: float | None = None


class View(Struct, frozen=True, kw_only=True):
    status: str = ""
    status_message: str = ""
    desired: str = "running"
    update: str | None = None
    """"rolling" or "failed", of a deployment that serves its previous version."""
    stages: tuple[Stage, ...] = ()


def fold(view: View, snapshot: Any, now: float) -> View:
    """The view after one more snapshot.

    A download that is no longer reported is over; an engine that is no longer reported is gone, unless it is READY.
    """
    update = snapshot.get("update")
    known = {stage.name: stage for stage in view.stages}
    said = snapshot.get("progress") or {}
    for name in NAMES:
        if said.get(name) is not None:
            known[name] = _stage(name, said[name], known.get(name), now)
        elif name in known and known[name].ended_at is None:
            if name == "engine" and (snapshot["status"] != "READY" or update):
                del known[name]
            else:
                known[name] = _ended(known[name], now)
    return View(
        status=snapshot["status"],
        status_message=clean(snapshot.get("status_message") or ""),
        desired=snapshot.get("desired") or "running",
        update=update,
        stages=tuple(known[name] for name in NAMES if name in known),
    )


def _stage(name: str, said: Any, before: Stage | None, now: float) -> Stage:
    return Stage(
        name=name,
        message=clean(said.get("message") or ""),
        done_bytes=said.get("done_bytes") or 0,
        total_bytes=said.get("total_bytes") or 0,
        rate_bytes_s=said.get("rate_bytes_s") or 0.0,
        started_at=before.started_at if before else now,
    )


def _ended(stage: Stage, now: float) -> Stage:
    return Stage(
        name=stage.name,
        message=stage.message,
        done_bytes=stage.total_bytes or stage.done_bytes,
        total_bytes=stage.total_bytes,
        started_at=stage.started_at,
        ended_at=now,
    )


def describe(stage: Stage, now: float) -> str:
    """What is known about a stage, without its name: `1.2 of 3.4 GB · 45 MB/s · 0:48 left`."""
    if stage.ended_at is not None:
        size = [size_text(stage.done_bytes)] if stage.done_bytes else []
        return " · ".join(["done", *size, clock(stage.ended_at - stage.started_at)])
    if not stage.done_bytes and not stage.total_bytes:
        return " · ".join(part for part in (stage.message, clock(now - stage.started_at)) if part)
    parts = [_share(stage.done_bytes, stage.total_bytes)]
    if stage.rate_bytes_s > 0:
        parts.append(f"{size_text(stage.rate_bytes_s)}/s")
        if stage.total_bytes > stage.done_bytes:
            parts.append(f"{clock((stage.total_bytes - stage.done_bytes) / stage.rate_bytes_s)} left")
    return " · ".join([*parts, stage.message] if stage.message else parts)


def fraction(stage: Stage) -> float | None:
    """How much of it is done, where its size is known."""
    if stage.ended_at is not None:
        return 1.0
    return min(1.0, stage.done_bytes / stage.total_bytes) if stage.total_bytes else None


def plain_lines(before: View, after: View, now: float) -> list[str]:
    """What is worth a line of its own where lines stay: new messages in brief, and every tenth of a stage."""
    known = {stage.name: stage for stage in before.stages}
    fresh = [s for s in after.stages if s.name not in known or _step(s) != _step(known[s.name])]
    lines = [f"{stage.name:8}  {describe(stage, now)}" for stage in fresh if stage.message or stage.total_bytes]
    said = brief(after.status_message)
    news = (before.status, brief(before.status_message)) != (after.status, said)
    if news and (after.status != "READY" or after.update):
        lines.append(f"{after.status:8}  {said}")
    return lines


def brief(message: str) -> str:
    """What is said in one line: without the log lines that prove it, and with when it is tried again."""
    first, *more = message.split("\n")
    return " ".join([first, *(line for line in more if line.startswith("Trying again at"))])


def _step(stage: Stage) -> tuple[object, ...]:
    share = fraction(stage)
    return (stage.message, stage.ended_at is not None, None if share is None else int(share * 10))


def clock(seconds: float) -> str:
    """`0:07`, `12:34`, `1:02:03`."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _share(done: float, total: float) -> str:
    if not total:
        return size_text(done)
    done_text, done_unit = size_text(done).split(" ")
    total_text, total_unit = size_text(total).split(" ")
    first = done_text if done_unit == total_unit else f"{done_text} {done_unit}"
    return f"{first} of {total_text} {total_unit}"


def size_text(size_bytes: float) -> str:
    """Decimal units, as registries and hubs count."""
    for unit in ("B", "kB", "MB", "GB"):
        if size_bytes < 999.5:
            return f"{size_bytes:.0f} {unit}" if unit in ("B", "kB", "MB") else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1000
    return f"{size_bytes:.2f} TB"
