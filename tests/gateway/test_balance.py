"""Who is asked, of several that serve a model."""

from __future__ import annotations

import pytest

from nimhost.gateway.balance import MAX_PAUSE_S, OPEN_AFTER, PAUSE_S, Standing, choose, is_failure


def standing(under_way: int = 0, failures: int = 0, now_s: float = 0.0) -> Standing:
    found = Standing()
    for _ in range(failures):
        found.fail(now_s)
    for _ in range(under_way):
        found.begin()
    return found


BUSY, FREE, OPEN = "busy", "free", "open"


@pytest.mark.parametrize(
    ("candidates", "chosen"),
    [
        ([(0, FREE)], 0),
        ([(0, FREE), (0, FREE)], 0),
        ([(0, BUSY), (0, FREE)], 1),
        ([(1, FREE), (0, BUSY)], 1),
        ([(0, OPEN), (0, BUSY)], 1),
        ([(0, OPEN), (1, BUSY)], 1),
        ([(0, OPEN)], 0),
        ([(1, OPEN), (0, OPEN)], 1),
    ],
    ids=[
        "the-only-one", "the-first", "the-least-busy", "local-before-external", "well-before-open",
        "external-before-open-local", "nobody-is-refused", "all-open-local-first",
    ],
)  # fmt: skip
def test_choice(candidates: list[tuple[int, str]], chosen: int) -> None:
    made = {BUSY: standing(3), FREE: standing(), OPEN: standing(failures=OPEN_AFTER)}
    assert choose([(priority, made[how]) for priority, how in candidates], 1.0) == chosen


def test_circuit_opens_after_failures_in_a_row_only() -> None:
    one = standing(failures=OPEN_AFTER - 1)
    one.succeed()
    one.fail(0.0)
    assert not one.open(0.0)
    for _ in range(OPEN_AFTER - 1):
        one.fail(0.0)
    assert one.open(PAUSE_S - 0.1)
    assert not one.open(PAUSE_S)


def test_one_request_finds_out_and_the_others_go_elsewhere() -> None:
    one, other = standing(failures=OPEN_AFTER), standing(under_way=100)
    candidates = [(0, one), (0, other)]
    assert choose(candidates, PAUSE_S) == 0
    assert one.begin() is True
    assert choose(candidates, PAUSE_S) == 1
    one.succeed()
    one.end(True)
    assert choose(candidates, PAUSE_S) == 0
    assert one.begin() is False


def test_probe_whose_client_leaves_is_followed_by_another() -> None:
    one = standing(failures=OPEN_AFTER)
    one.begin()
    one.end(True)
    assert not one.open(PAUSE_S)


def test_pause_doubles_with_every_failed_probe_up_to_a_limit() -> None:
    one, now_s, pauses = standing(failures=OPEN_AFTER), 0.0, []
    for _ in range(8):
        pauses.append(one.retry_at_s - now_s)
        now_s = one.retry_at_s
        one.begin()
        one.fail(now_s)
        one.end(True)
    assert pauses[:4] == [PAUSE_S, 2 * PAUSE_S, 4 * PAUSE_S, 8 * PAUSE_S]
    assert pauses[-1] == MAX_PAUSE_S


def test_when_all_are_open_the_one_whose_pause_ends_first_is_tried() -> None:
    early, late = standing(failures=OPEN_AFTER), standing(failures=OPEN_AFTER, now_s=1.0)
    assert choose([(0, late), (1, early)], 2.0) == 1


@pytest.mark.parametrize(("status", "failed"), [(200, False), (404, False), (429, False), (500, True), (503, True)])
def test_failures_are_the_upstreams_own(status: int, failed: bool) -> None:
    assert is_failure(status) is failed
