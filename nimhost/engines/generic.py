"""Any other image: started as it is, ready when its health path answers 200."""

from __future__ import annotations

from nimhost.engines.order import HostFacts, Order, image_of, mounts_of
from nimhost.engines.spec import ContainerSpec, Probe
from nimhost.engines.vllm import run_as


def generic(order: Order, host: HostFacts) -> ContainerSpec:
    return ContainerSpec(
        image=image_of(order, ""),
        args=tuple(order.executor.additional_args),
        env=dict(order.executor.additional_envs or {}),
        mounts=mounts_of(order, host),
        probe=Probe(health_path=order.executor.health_check_path or "/v1/health/ready"),
        gpus=order.gpus,
        shm_bytes=host.shm_bytes if order.gpus else None,
        user=run_as(order),
        policy="generic",
    )
