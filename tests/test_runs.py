"""What is remembered of a deployment when its wish changes."""

from __future__ import annotations

import pytest

from nimhost.runs import Failure, Run

READY = Run(spec_hash="a", version=1, config_version=3, ready_container="c", ready_at=5.0, resolved={"image": "i"})
FINAL = Failure(message="no", final=True)


def test_the_version_that_was_ready_is_the_previous_one() -> None:
    run = READY.of("b", 2, 3)
    assert (run.spec_hash, run.version, run.ready_container) == ("b", 2, None)
    assert run.previous == READY


def test_a_version_that_never_was_ready_hands_on_the_one_before_it() -> None:
    assert READY.of("b", 2, 3).of("c", 3, 3).previous == READY


def test_a_version_that_broke_for_good_is_not_gone_back_to() -> None:
    broken = Run(spec_hash="a", ready_container="c", failure=FINAL)
    assert broken.of("b", 2, 1).previous is None


def test_the_wish_of_the_previous_version_is_that_version() -> None:
    assert READY.of("b", 2, 3).of("a", 1, 3) == READY


def test_gpus_that_were_kept_stay_kept_for_the_next_wish() -> None:
    rolling = Run(spec_hash="b", previous=READY, replaced_at=9.0, kept_gpus=("GPU-0",))
    assert (rolling.of("c", 3, 3).kept_gpus, rolling.of("c", 3, 3).replaced_at) == (("GPU-0",), 0.0)
    assert rolling.of("a", 1, 3).kept_gpus == ("GPU-0",)


def test_another_version_of_an_equal_config_is_the_same_run() -> None:
    assert READY.of("a", 1, 4).previous is None
    assert READY.of("a", 1, 4).config_version == 4


@pytest.mark.parametrize("hash", ["a", "b"])
def test_what_is_learnt_of_one_version_leaves_the_other_alone(hash: str) -> None:
    whole = READY.of("b", 2, 3)
    part = whole.part(hash)
    assert part is not None
    changed = whole.with_part(Run(spec_hash=hash, attempts=7, previous=part.previous))
    assert changed.part(hash) == Run(spec_hash=hash, attempts=7, previous=part.previous)
    other = "b" if hash == "a" else "a"
    assert changed.part(other) == (READY if other == "a" else changed)
    assert whole.part("c") is None


def test_forgiving_forgives_both() -> None:
    failed = Run(spec_hash="b", failure=FINAL, previous=Run(spec_hash="a", failure=FINAL), kept_gpus=("GPU-0",))
    assert failed.failed
    assert not failed.forgiven().failed
    assert failed.forgiven().kept_gpus == ("GPU-0",)  # a start in the middle of a roll gives nothing away
