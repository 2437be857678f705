"""What is to be done about the adapters of an engine: every situation of the rules, as tables."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from nimhost.deployments.adapters import (
    LOADING,
    REFRESHING,
    Copy,
    Engine,
    Lacking,
    Load,
    Step,
    Unload,
    Wait,
    Wanted,
    changes_for_nims,
    difference,
    loaded_in,
    rank_problem,
    refused_by_all,
)
from nimhost.deployments.observed import Health
from nimhost.refs import Ref

MODEL = Ref("default", "base")
MATH = Wanted(ref=Ref("default", "math"), model=MODEL)
FAR = Wanted(ref=Ref("other", "far"), model=MODEL)
ELSE = Wanted(ref=Ref("default", "else"), model=Ref("default", "another"))
HERE, NEWER = Copy(directory="default--math@1", rank=8), Copy(directory="default--math@2", rank=8)
VLLM = Engine(container="c", deployment=Ref("default", "dd"), kind="vllm", url="http://e", model=MODEL, max_rank=16)
NIM = replace(VLLM, kind="nim")


def having(engine: Engine, **loaded: str) -> Engine:
    return replace(engine, loaded={name.replace("__", "--"): directory for name, directory in loaded.items()})


@pytest.mark.parametrize(
    ("wanted", "copies", "engine", "steps"),
    [
        ((), {}, VLLM, ()),
        ((MATH,), {}, VLLM, (Wait("default--math", LOADING),)),
        ((MATH,), {MATH.ref: Lacking(message="no")}, VLLM, (Wait("default--math", "no"),)),
        ((MATH,), {MATH.ref: HERE}, VLLM, (Load("default--math", HERE.directory),)),
        ((MATH,), {MATH.ref: HERE}, having(VLLM, default__math=HERE.directory), ()),
        ((MATH,), {MATH.ref: NEWER}, having(VLLM, default__math=HERE.directory),
         (Load("default--math", NEWER.directory, in_place=True),)),
        ((MATH,), {MATH.ref: Lacking(message="hub down")}, having(VLLM, default__math=HERE.directory),
         (Wait("default--math", "hub down"),)),
        ((), {}, having(VLLM, default__math=HERE.directory), (Unload("default--math"),)),
        ((), {MATH.ref: HERE}, having(VLLM, default__math=HERE.directory), (Unload("default--math"),)),
        ((), {}, having(VLLM, user__own=""), ()),
        ((ELSE,), {ELSE.ref: HERE}, VLLM, ()),
        ((FAR, MATH), {MATH.ref: HERE, FAR.ref: Copy(directory="other--far@1", rank=4)},
         having(VLLM, default__old="default--old@1"),
         (Unload("default--old"), Load("default--math", HERE.directory), Load("other--far", "other--far@1"))),
        ((MATH,), {MATH.ref: HERE}, NIM, (Wait("default--math", REFRESHING),)),
        ((MATH,), {MATH.ref: HERE}, having(NIM, default__math=""), ()),
        ((), {}, having(NIM, default__math=""), ()),
    ],
)  # fmt: skip
def test_what_brings_an_engine_in_step(
    wanted: tuple[Wanted, ...], copies: dict[Ref, Copy | Lacking], engine: Engine, steps: tuple[Step, ...]
) -> None:
    assert difference(wanted, copies, engine) == steps


@pytest.mark.parametrize(
    ("rank", "max_rank", "loads"), [(16, 16, True), (17, 16, False), (512, None, True), (8, 64, True)]
)
def test_a_rank_that_the_engine_was_not_started_for_waits(rank: int, max_rank: int | None, loads: bool) -> None:
    engine = replace(VLLM, max_rank=max_rank)
    (step,) = difference([MATH], {MATH.ref: Copy(directory="d", rank=rank)}, engine)
    assert isinstance(step, Load if loads else Wait)


def test_the_refusal_names_the_next_rank_that_vllm_offers() -> None:
    engine = replace(VLLM, more_rank="do --max-lora-rank {rank}")
    assert rank_problem(17, engine) == (
        "Its rank is 17, and default/dd was started for 16 at most. Change it: do --max-lora-rank 32"
    )
    assert "for 16 at most. Change it: do --max-lora-rank 17" in rank_problem(17, replace(engine, kind="nim"))


@pytest.mark.parametrize(
    ("ranks", "refused"), [((), False), ((16,), True), ((16, 8), True), ((16, 64), False), ((16, None), False)]
)
def test_it_is_refused_only_where_no_engine_can_load_it(ranks: tuple[int | None, ...], refused: bool) -> None:
    engines = [replace(VLLM, container=str(n), max_rank=rank) for n, rank in enumerate(ranks)]
    engines.append(replace(VLLM, model=Ref("default", "another"), max_rank=4))
    assert (refused_by_all(32, MODEL, engines) is not None) is refused


def test_what_an_engine_has_loaded_is_read_from_its_list() -> None:
    health = Health(
        state="ok",
        models=("default/base", "other--nim", "a/b--c"),
        adapters=(("default--math", "/loras/default--math@1"), ("user--own", "/else"), ("sql", "/x")),
    )
    assert loaded_in(health) == {"other--nim": "", "default--math": "default--math@1", "user--own": ""}


@pytest.mark.parametrize(
    ("mine", "shown", "listed", "hide", "show"),
    [
        ({}, {}, (), (), ()),
        ({"x": HERE}, {}, (), (), (("x", HERE.directory),)),
        ({"x": HERE}, {"x": HERE.directory}, (), (), ()),
        ({"x": NEWER}, {"x": HERE.directory}, (), ("x",), ()),
        ({"x": NEWER}, {}, {"x"}, (), ()),
        ({"x": NEWER}, {}, {"y"}, (), (("x", NEWER.directory),)),
        ({}, {"x": HERE.directory}, (), ("x",), ()),
        ({"x": Lacking(message="")}, {"x": HERE.directory}, (), (), ()),
        ({"x": Lacking(message="")}, {}, (), (), ()),
        ({"x": replace(HERE, rank=64)}, {}, (), (), ()),
        ({"x": replace(HERE, rank=64)}, {"x": HERE.directory}, (), ("x",), ()),
        ({"x": HERE}, {"x": ""}, (), ("x",), ()),
    ],
)
def test_what_nims_are_shown(
    mine: dict[str, Copy | Lacking],
    shown: dict[str, str],
    listed: set[str],
    hide: tuple[str, ...],
    show: tuple[tuple[str, str], ...],
) -> None:
    assert changes_for_nims(mine, shown, listed, 32) == (hide, show)
