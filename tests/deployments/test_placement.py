"""Which GPUs a deployment gets, and what it is told while it gets none."""

from __future__ import annotations

from typing import Any

import pytest

from nimhost.deployments.need import Need
from nimhost.deployments.observed import GpuSlot, Share, Stranger
from nimhost.deployments.placement import choose, free_bytes, obstacle, utilization, waiting, waits_for_memory
from nimhost.models.memory import GIB, Ask

BOB = Stranger(pid=4242, name="python", user="bob", used_bytes=20 * GIB)
NVLINK, SYSTEM = 7, 1


def gpu(index: int, gib: float = 24, *, used: float = 0, name: str = "", **fields: Any) -> GpuSlot:
    return GpuSlot(
        uuid=f"GPU-{index}", index=index, name=name or f"SIM-{gib:g}G", total_bytes=int(gib * GIB),
        used_bytes=int(used * GIB), **fields,
    )  # fmt: skip


def alone(gpus: int = 1, gib: float = 10, ref: str = "default/d") -> Need:
    return Need(ref=ref, gpus=gpus, memory_bytes={f"GPU-{i}": int(gib * GIB) for i in range(9)})


def share(gib: float, gpus: int = 1) -> Need:
    size = int(gib * GIB)
    return Need(ref="default/d", gpus=gpus, share_bytes=size, memory_bytes={f"GPU-{i}": size for i in range(9)})


def linked(*indexes: int, pairs: dict[tuple[int, int], int]) -> list[GpuSlot]:
    slots = []
    for i in indexes:
        links = {f"GPU-{b if a == i else a}": speed for (a, b), speed in pairs.items() if i in (a, b)}
        slots.append(gpu(i, links=links))
    return slots


CASES: dict[str, tuple[list[GpuSlot], Need, list[int] | None]] = {
    "the first of equal ones": ([gpu(0), gpu(1)], alone(), [0]),
    "the smallest that is enough, so that the large one stays free": ([gpu(0, 80), gpu(1, 24)], alone(), [1]),
    "a large one for a large model": ([gpu(0, 24), gpu(1, 80)], alone(gib=40), [1]),
    "not one that somebody has alone": ([gpu(0, holder="default/x"), gpu(1)], alone(), [1]),
    "not one that cannot be read": ([gpu(0, problem="lost"), gpu(1)], alone(), [1]),
    "not one where memory is held": ([gpu(0, used=20, strangers=(BOB,)), gpu(1)], alone(), [1]),
    "none where memory is short everywhere": ([gpu(0, used=20), gpu(1, used=20)], alone(), None),
    "a clean one rather than a tight one with a stranger": (
        [gpu(0, used=3, strangers=(Stranger(pid=1, used_bytes=3 * GIB),)), gpu(1)], alone(), [1],
    ),
    "with a stranger if there is no other": (
        [gpu(0, used=3, strangers=(Stranger(pid=1, used_bytes=3 * GIB),))], alone(), [0],
    ),
    "the pair with the fastest way between them": (
        linked(0, 1, 2, 3, pairs={(0, 1): SYSTEM, (0, 2): SYSTEM, (1, 3): NVLINK, (0, 3): SYSTEM}), alone(2), [1, 3],
    ),
    "four whose slowest way is the fastest": (
        linked(0, 1, 2, 3, 4, pairs={
            (0, 1): 7, (0, 2): 1, (0, 3): 1, (0, 4): 1, (1, 2): 3, (1, 3): 3, (1, 4): 3, (2, 3): 3, (2, 4): 3,
            (3, 4): 3,
        }), alone(4), [1, 2, 3, 4],
    ),
    "GPUs of one kind rather than fast ones of two kinds": (
        [gpu(0, links={"GPU-1": NVLINK}), gpu(1, 48, links={"GPU-0": NVLINK}), gpu(2, 48)], alone(2), [1, 2],
    ),
    "not two when one is free": ([gpu(0), gpu(1, holder="default/x")], alone(2), None),
    "a share beside another": ([gpu(0, shares=(Share("default/a", 10 * GIB),)), gpu(1)], share(10), [0]),
    "a share that does not fit beside the other": (
        [gpu(0, shares=(Share("default/a", 16 * GIB),)), gpu(1)], share(10), [1],
    ),
    "no share of a GPU that somebody has alone": ([gpu(0, holder="default/x")], share(1), None),
    "nobody alone where somebody has a share": ([gpu(0, shares=(Share("default/a", GIB),))], alone(gib=1), None),
    "no share where an engine is loading": ([gpu(0, starting="default/a"), gpu(1)], share(5), [1]),
    "its own other version loading is one, too": ([gpu(0, starting="default/d")], share(5), None),
}  # fmt: skip


@pytest.mark.fault(7)
@pytest.mark.parametrize("case", CASES)
def test_a_deployment_gets(case: str) -> None:
    slots, need, expected = CASES[case]
    chosen = choose(slots, need)
    assert (chosen and [slot.index for slot in chosen]) == expected
    assert choose(slots[::-1], need) == chosen


def test_what_was_promised_counts_before_it_is_taken_and_what_is_taken_only_once() -> None:
    promised = gpu(0, used=1, shares=(Share("a", 10 * GIB),))
    taken = gpu(0, used=11, shares=(Share("a", 10 * GIB),))
    beside = gpu(0, used=11, shares=(Share("a", 10 * GIB),), strangers=(Stranger(pid=1, used_bytes=4 * GIB),))
    assert [free_bytes(slot) / GIB for slot in (promised, taken, beside)] == [14, 13, 10]


@pytest.mark.fault(8)
@pytest.mark.parametrize(
    ("slot", "said"),
    [
        (
            gpu(0, used=20, strangers=(BOB,)),
            "GPU 0 has 4.0 of 24 GiB free, 10 are needed: python (pid 4242, user bob) holds 20 GiB",
        ),
        (gpu(0, used=20), "it was not given back yet, and the driver names nobody who has it"),
        (gpu(0, used=20, strangers=(Stranger(pid=7),)), "a process (pid 7) holds memory"),
        (gpu(0, holder="default/x"), "GPU 0 is held by default/x"),
        (gpu(0, shares=(Share("default/a", GIB), Share("default/b", GIB))), "GPU 0 is shared by default/a, default/b"),
        (gpu(0, starting="default/a"), "default/a is starting on GPU 0, and engines start there one after the other"),
        (gpu(0, problem="it fell off the bus"), "GPU 0 cannot be used: it fell off the bus"),
    ],
)
def test_who_is_in_the_way_is_named(slot: GpuSlot, said: str) -> None:
    assert said in (obstacle(slot, alone()) or "")


def test_a_share_that_is_too_large_names_the_other_shares() -> None:
    slot = gpu(0, shares=(Share("default/a", 16 * GIB),))
    assert "default/a has 16 GiB" in (obstacle(slot, share(10)) or "")


def test_the_message_counts_and_names() -> None:
    slots = [gpu(0, holder="default/x"), gpu(1)]
    assert waiting(slots, alone(2), None) == "Waiting for GPUs: needs 2, 1 free: GPU 0 is held by default/x."
    assert waiting([gpu(0)], alone(), "default/a").endswith("1 free. default/a waits ahead of it.")


def test_only_memory_has_to_be_measured_again() -> None:
    assert waits_for_memory([gpu(0, used=20)], alone())
    assert not waits_for_memory([gpu(0, used=20, holder="default/x")], alone())
    assert not waits_for_memory([gpu(0, starting="default/x")], alone())
    assert not waits_for_memory([gpu(0)], alone())


@pytest.mark.parametrize(
    ("slots", "need", "ask", "expected"),
    [
        ([gpu(0)], alone(), Ask(), None),  # as it does by itself
        ([gpu(0, 80), gpu(1, 80)], share(20, 2), Ask(), 0.25),
        ([gpu(0, 24)], share(10), None, 0.4166),  # rounded down, never more than promised
        ([gpu(0, 24, used=4)], alone(), Ask(), 0.8229),  # what is left, less a margin
        ([gpu(0, 24, used=4)], alone(), None, None),  # nothing is known about its appetite
        ([gpu(0, 24, used=4)], alone(), Ask(chosen_by_person=True, utilization=0.5), None),
        ([GpuSlot(uuid="GPU-0", index=0)], share(10), Ask(), None),  # unmeasured
    ],
)
def test_the_fraction_that_an_engine_is_told(
    slots: list[GpuSlot], need: Need, ask: Ask | None, expected: float | None
) -> None:
    assert utilization(slots, need, ask) == expected
