"""Two deployments are not given the same room on disk: what was decided on counts before a byte of it is promised."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from msgspec.structs import replace

from nimhost.cli.stages import brief
from nimhost.deployments.actions import Action, Prepare
from nimhost.deployments.desired import Desired
from nimhost.deployments.observed import Room
from nimhost.deployments.plan import plan
from nimhost.deployments.retry import after_error
from nimhost.errors import DiskFull, HubUnavailable
from nimhost.models.memory import GIB, Ask
from nimhost.runs import Failure, Run
from tests.deployments.make import HASH, LIMITS, NOW, decide, machine, wanted
from tests.deployments.test_fit import order
from tests.deployments.test_preflight import CARD, HUB
from tests.models import test_checkpoint as known

FETCH = Prepare(image=False, weights=True, hash=HASH)
NEED = int(3.3 * GIB)
"""A little more than the weights of Qwen3 1.7B take."""
FULL = Run(spec_hash=HASH, attempts=1, retry_at=NOW + 60, failure=Failure(message="disk full", final=False))


def one(name: str, created: int, repo: str = "", **fields: Any) -> Desired:
    d = wanted(name, created=created, **{k: v for k, v in fields.items() if k in ("desired", "run", "problem")})
    weights = replace(HUB, repo_id=repo or f"org/{name}")
    return replace(d, order=order(known.QWEN3_1_7B), ask=Ask(), weights=weights)


def fetched(
    *desired: Desired,
    free_bytes: int,
    in_flight: dict[str, Action] | None = None,
    here: tuple[str, ...] = (),
    rooms: dict[str, dict[str, Any]] | None = None,
) -> list[str]:
    """Names of those whose weights are, or are to be, fetched. `rooms`: by name, what else is known of the disk."""
    observed = machine(
        gpus=(CARD,),
        images={d.ref: "sha256:1" for d in desired},
        weights={d.ref: object() if d.ref.name in here else None for d in desired},
        rooms={
            d.ref: Room(weights_path="/w", weights_free_bytes=free_bytes, **(rooms or {}).get(d.ref.name, {}))
            for d in desired
        },
    )
    running = {f"id-{name}": action for name, action in (in_flight or {}).items()}
    verdicts = plan(desired, observed, running, NOW, LIMITS)
    for v in verdicts:
        if v.status == "ERROR" and v.desired.problem is None:
            assert "No room for the weights: about 3.2 GiB at /w" in v.message
    new = [v.desired.ref.name for v in verdicts if isinstance(v.action, Prepare)]
    return sorted(new + list(in_flight or {}))


A, B, C = one("a", 1), one("b", 2), one("c", 3)


@pytest.mark.fault(17)
@pytest.mark.parametrize(
    ("free_bytes", "expected"),
    [(NEED - GIB, []), (NEED, ["a"]), (2 * NEED, ["a", "b"]), (3 * NEED, ["a", "b", "c"])],
)
def test_room_is_given_to_who_was_there_first_and_once(free_bytes: int, expected: list[str]) -> None:
    for desired in itertools.permutations((A, B, C)):
        assert fetched(*desired, free_bytes=free_bytes) == expected


@pytest.mark.fault(17)
def test_who_gets_none_is_told_whose_it_is() -> None:
    observed = machine(
        gpus=(CARD,), images={A.ref: "sha256:1", B.ref: "sha256:1"}, weights={},
        rooms={d.ref: Room(weights_path="/w", weights_free_bytes=NEED) for d in (A, B)},
    )  # fmt: skip
    second = plan((A, B), observed, {}, NOW, LIMITS)[1]
    assert "3.3 are free, of which 3.2 are promised to other downloads" in second.message


@pytest.mark.fault(17)
def test_a_download_that_had_begun_waits_for_room_and_one_that_had_not_is_refused() -> None:
    full = replace(FULL, retry_at=NOW - 1)
    observed = machine(
        gpus=(CARD,), images={A.ref: "sha256:1"}, weights={},
        rooms={A.ref: Room(weights_path="/w", weights_free_bytes=GIB)},
    )  # fmt: skip
    for run, status in ((Run(spec_hash=HASH), "ERROR"), (full, "PENDING")):
        verdict = decide(one("a", 1, run=run), observed)
        assert (verdict.status, verdict.action) == (status, None)
        assert "No room for the weights: about 3.2 GiB at /w, 1.0 are free." in verdict.message
        assert "nimhost weights prune" in (verdict.message if status == "ERROR" else brief(verdict.message))


def test_who_paused_on_a_full_disk_says_in_one_line_what_helps() -> None:
    run = after_error(Run(spec_hash=HASH), DiskFull("No space left.", "Free some: nimhost weights prune"), NOW, LIMITS)
    verdict = decide(wanted("a", weights=True, run=run), machine(weights={}))
    assert brief(verdict.message).startswith("No space left. Free some: nimhost weights prune Trying again at ")


@pytest.mark.fault(17)
@pytest.mark.parametrize(("made_at", "goes_on"), [(NOW - 2, False), (NOW, True)])
def test_who_paused_on_a_full_disk_goes_on_as_soon_as_room_was_made(made_at: float, goes_on: bool) -> None:
    """Where nobody knows how much it takes: else the sum would tell."""
    d = wanted("a", weights=True, run=after_error(Run(spec_hash=HASH), DiskFull("disk full"), NOW - 1, LIMITS))
    verdict = decide(d, machine(weights={}, room_made_at=made_at))
    assert isinstance(verdict.action, Prepare) == goes_on
    other = wanted("a", weights=True, run=after_error(Run(spec_hash=HASH), HubUnavailable("away"), NOW - 1, LIMITS))
    assert decide(other, machine(weights={}, room_made_at=made_at)).action is None


@pytest.mark.parametrize(
    ("other", "more", "expected"),
    [
        (one("b", 2, "org/a"), {}, ["a", "b"]),  # the bytes of one repository come once
        (replace(one("b", 2), weights=replace(HUB, repo_id="org/a", revision="v2")), {}, ["a", "b"]),
        (replace(one("b", 2), weights=replace(HUB, repo_id="org/a", registry="ngc")), {}, ["a"]),
        (one("b", 0, desired="stopped"), {}, ["a"]),
        (one("b", 0, problem="a secret is missing"), {}, ["a"]),
        (one("b", 0, run=FULL), {}, ["a"]),  # it waits after a failure: whoever fits meanwhile may go
        (one("b", 0), {"here": ("b",)}, ["a"]),
        (B, {"in_flight": {"b": FETCH}}, ["b"]),  # decided, and not promised yet, though the other is older
        (B, {"in_flight": {"b": FETCH}, "rooms": {"b": {"fetching": True}}}, ["a", "b"]),  # promised, and nearly here
        (
            B,
            {"in_flight": {"b": FETCH}, "rooms": {"a": {"promised_bytes": NEED}, "b": {"fetching": True}}},
            ["b"],
        ),
        (B, {"in_flight": {"b": replace(FETCH, weights=False, image=True)}}, ["a", "b"]),
    ],
)
def test_only_what_will_be_written_beside_it_counts(other: Desired, more: dict[str, Any], expected: list[str]) -> None:
    assert fetched(A, other, free_bytes=NEED, **more) == expected
