"""How engines are told what part of a GPU is theirs."""

from __future__ import annotations

from typing import Any

import pytest

from nimhost.engines.share import with_utilization
from nimhost.engines.spec import ContainerSpec, Probe


def made(policy: str, **fields: Any) -> ContainerSpec:
    return ContainerSpec(image="x", probe=Probe("/health"), policy=policy, **fields)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (("/m", "--a"), ("/m", "--gpu-memory-utilization", "0.416", "--a")),
        (("/m", "--gpu-memory-utilization", "0.5"), ("/m", "--gpu-memory-utilization", "0.5")),
        (("/m", "--gpu_memory_utilization=0.5"), ("/m", "--gpu_memory_utilization=0.5")),
    ],
)
def test_vllm_by_a_flag_unless_the_user_has_said_it(args: tuple[str, ...], expected: tuple[str, ...]) -> None:
    assert with_utilization(made("vllm", args=args), 0.416).args == expected


def test_nim_by_a_variable_unless_the_user_has_said_it() -> None:
    told = with_utilization(made("nim", env={"A": "1"}), 0.25).env
    assert told == {"A": "1", "NIM_KVCACHE_PERCENT": "0.25", "NIM_KV_CACHE_PERCENT": "0.25"}
    own = {"NIM_KVCACHE_PERCENT": "0.5"}
    assert with_utilization(made("nim", env=own), 0.25).env == own


def test_other_images_are_left_alone() -> None:
    spec = made("generic", args=("--a",), env={"B": "1"})
    assert with_utilization(spec, 0.25) == spec
