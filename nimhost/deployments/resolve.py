"""What a deployment becomes on this machine: its order with what only files can tell, cooked."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from msgspec.structs import replace

from nimhost.deployments.filesets import Filesets, read_tool_parser
from nimhost.deployments.observed import Located
from nimhost.engines.check import check_order
from nimhost.engines.order import HostFacts, ModelOrder, Order, Script
from nimhost.engines.recipes import cook
from nimhost.engines.spec import WEIGHTS_DIR, ContainerSpec, Mount
from nimhost.entities import Adapter, Entity
from nimhost.errors import BadRequest, NimhostError
from nimhost.host.weights.source import Directory
from nimhost.host.weights.spec import describe_weights
from nimhost.models.adapter import rank_of
from nimhost.refs import Ref, parse_ref
from nimhost.store import Store

log = logging.getLogger(__name__)

ADAPTER_CONFIG_BYTES = 1 << 20


class Resolver:
    """Reads what a recipe has to know, and follows it."""

    def __init__(self, store: Store, filesets: Filesets, host: HostFacts) -> None:
        self._store = store
        self._filesets = filesets
        self._host = host

    async def check(self, order: Order) -> None:
        """Raises BadRequest, naming the field, for an order that no engine can start with."""
        check_order(order, replace(self._host, tool_parser=await self._tool_parser(order)))

    async def resolve(self, order: Order, located: Located | None) -> ContainerSpec:
        """`located`: the order's weights. Raises BadRequest; a HostError when a plugin cannot be read."""
        if order.model is not None:
            order = replace(order, model=await self._known(order.model, located, order.model_spec.lora_enabled))
        host = replace(_with_weights(self._host, located), tool_parser=await self._tool_parser(order))
        spec = cook(order, host)
        for warning in spec.warnings:
            log.warning("%s: %s", order.ref, warning)
        return spec

    async def _known(self, model: ModelOrder, located: Located | None, lora: bool) -> ModelOrder:
        """With the spec of the weights that are here, should the model's own not be there yet."""
        if model.spec is None and located is not None:
            try:
                source = Directory(Path(located.source) / located.subdirectory)
                model = replace(model, spec=await describe_weights(source, model.ref.name))
            except NimhostError as error:  # the engine will know what to make of them
                log.info("%s: %s", model.ref, error.message)
        return replace(model, lora_ranks=await self._ranks(model.ref)) if lora else model

    async def _tool_parser(self, order: Order) -> Script | None:
        plugin = order.chat.tools.tool_call_plugin
        if plugin is None:
            return None
        field = "tool_call_config.tool_call_plugin"
        where = parse_ref(plugin, order.model.ref.workspace if order.model else order.ref.workspace)
        fileset = await self._store.find("filesets", *where)
        if fileset is None:
            raise BadRequest(f"{field}: Fileset '{plugin}' not found")
        return await read_tool_parser(await self._filesets.open(fileset), field)

    async def _ranks(self, model: Ref) -> tuple[int, ...]:
        """Ranks of the model's enabled LoRA adapters, as far as they can be known."""
        rows = [row for row in await self._store.adapters_of([str(model)]) if row.wish.enabled]
        found = [await self._rank(row) for row in rows if row.wish.finetuning_type == "lora"]
        return tuple(rank for rank in found if rank is not None)

    async def _rank(self, row: Entity) -> int | None:
        adapter: Adapter = row.wish
        if adapter.lora_config is not None:
            return adapter.lora_config.rank
        try:
            fileset = await self._store.find("filesets", *parse_ref(adapter.fileset, row.workspace))
            if fileset is None:
                return None
            content = await (await self._filesets.open(fileset)).read("adapter_config.json", ADAPTER_CONFIG_BYTES)
            return rank_of(json.loads(content)) or None
        except (NimhostError, ValueError, AttributeError) as error:
            log.info("the rank of adapter %s is not known: %s", row.ref, error)
            return None


def _with_weights(host: HostFacts, located: Located | None) -> HostFacts:
    if located is None:
        return host
    path = f"{WEIGHTS_DIR}/{located.subdirectory}" if located.subdirectory else WEIGHTS_DIR
    return replace(host, weights=Mount(located.source, WEIGHTS_DIR), weights_path=path)
