"""The three recipes by engine, and what an order needs before its recipe can be cooked."""

from __future__ import annotations

from collections.abc import Callable

from nimhost.engines.generic import generic
from nimhost.engines.nim import nim, serves_our_weights
from nimhost.engines.order import HostFacts, Order, image_of
from nimhost.engines.spec import ContainerSpec
from nimhost.engines.vllm import vllm
from nimhost.entities import Engine

RECIPES: dict[Engine, Callable[[Order, HostFacts], ContainerSpec]] = {"nim": nim, "vllm": vllm, "generic": generic}


def cook(order: Order, host: HostFacts) -> ContainerSpec:
    return RECIPES[order.engine](order, host)


def default_image(engine: Engine, host: HostFacts) -> str:
    return {"nim": host.nim_image, "vllm": host.vllm_image, "generic": ""}[engine]


def needs_weights(order: Order, host: HostFacts) -> bool:
    """Whether weights have to be on this machine before the engine can start."""
    if order.engine == "vllm":
        return True
    if order.engine == "nim":
        return serves_our_weights(order, host.nim_image)
    return order.model is not None and order.model.fileset is not None


def image_for(order: Order, host: HostFacts) -> str:
    return image_of(order, default_image(order.engine, host))
