"""Containers of others that ask for GPUs by number, by index or for all: booked on the ones that they really have."""

from __future__ import annotations

import pytest

from nimhost.deployments.gpu_use import Claim, by_uuid, shown, slots_of
from nimhost.host.gpus import Gpu

CARDS = tuple(Gpu(uuid=f"GPU-{i}", index=i, name="SIM", memory_bytes=24 * 2**30) for i in range(4))


def held(*wanted: str, usable: tuple[Gpu, ...] = CARDS) -> list[str]:
    claims = by_uuid([Claim("container x", "c1", wanted)], CARDS)
    return [slot.uuid for slot in slots_of(usable, claims) if slot.holder]


@pytest.mark.fault(6)
@pytest.mark.parametrize(
    ("wanted", "usable", "expected"),
    [
        (("count:2",), CARDS, ["GPU-0", "GPU-1"]),
        (("count:2",), CARDS[1:], ["GPU-1"]),  # [gpus] devices leaves GPU 0 to others: it is the one they have
        (("count:2",), CARDS[2:], []),
        (("all",), CARDS[2:], ["GPU-2", "GPU-3"]),
        (("1",), CARDS[1:], ["GPU-1"]),
        (("GPU-3", "GPU-3"), CARDS, ["GPU-3"]),
        (("GPU-none",), CARDS, []),
    ],
)
def test_a_number_of_gpus_is_the_first_ones_of_the_machine(
    wanted: tuple[str, ...], usable: tuple[Gpu, ...], expected: list[str]
) -> None:
    assert held(*wanted, usable=usable) == expected


def test_each_gpu_is_shown_with_who_has_it_and_no_other() -> None:
    claims = by_uuid([Claim("container x", "c1", ("count:1",))], reversed(CARDS))
    assert [shown(gpu, claims)["holder"] for gpu in CARDS] == ["container x", None, None, None]
    assert [shown(gpu, claims, gpu.index != 0)["usable"] for gpu in CARDS] == [False, True, True, True]
