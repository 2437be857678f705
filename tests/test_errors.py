from __future__ import annotations

import os

import pytest

from nimhost.errors import STATUS, InvalidRequest, NimhostError, NotFound, all_errors, from_reply, status_of


@pytest.mark.parametrize("cls", all_errors().values(), ids=lambda cls: cls.__name__)
def test_every_error_has_a_status_and_survives_the_round_trip(cls: type[NimhostError]) -> None:
    error = cls("what happened", "what to do")
    back = from_reply(status_of(error), cls.__name__, error.message, error.hint)
    assert type(back) is cls
    assert (back.message, back.hint, str(back)) == ("what happened", "what to do", "what happened")


@pytest.mark.parametrize("cls", all_errors().values(), ids=lambda cls: cls.__name__)
def test_every_error_is_drawn_in_the_tree(cls: type[NimhostError]) -> None:
    import nimhost.errors

    assert f" {cls.__name__}" in f" {nimhost.errors.__doc__}".replace("\n", " ")


def test_a_reply_of_somebody_else_becomes_the_plainest_error_of_its_status() -> None:
    assert type(from_reply(404, None, "no", None)) is NotFound
    assert type(from_reply(418, "Teapot", "no", None)) is NimhostError


def test_a_wrong_field_is_named_in_both_forms() -> None:
    error = InvalidRequest.field("must be at least 0", "executor_config", "gpu", input=-1)
    assert error.message == "executor_config.gpu: must be at least 0"
    assert error.problems[0]["loc"] == ["body", "executor_config", "gpu"]


def test_the_table_holds_no_class_twice_over() -> None:
    for cls, status in STATUS.items():
        parents = [STATUS[base] for base in cls.__mro__[1:] if base in STATUS]
        assert not parents or parents[0] != status, f"{cls.__name__} has its parent's status: leave it out"


def test_a_message_that_names_an_odd_file_can_be_stored_and_sent() -> None:
    error = NotFound(os.fsdecode(b"caf\xe9.py is not there"), hint=os.fsdecode(b"\xff"))
    assert (error.message, error.hint) == ("caf?.py is not there", "?")
