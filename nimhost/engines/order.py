"""What a recipe is given: one deployment with everything it refers to, and the few facts of the host it may use."""

from __future__ import annotations

import hashlib
import re

from msgspec import Struct

from nimhost.engines.spec import ADAPTERS_DIR, WEIGHTS_DIR, Mount
from nimhost.entities import DeployModelSpec, Engine, ExecutorConfig, ModelSpec, Storage, ToolCallConfig
from nimhost.errors import BadRequest
from nimhost.refs import Ref


class ChatOrder(Struct, frozen=True, kw_only=True):
    """How a model formats chats and calls tools, as far as somebody said."""

    chat_template: str | None = None
    tools: ToolCallConfig = ToolCallConfig()


class ModelOrder(Struct, frozen=True, kw_only=True):
    """The model entity of an order, reduced to what decides how it is served."""

    ref: Ref
    fileset: Ref | None = None
    storage: Storage | None = None
    """Where the fileset's files are; None while the fileset is missing."""
    spec: ModelSpec | None = None
    chat: ChatOrder = ChatOrder()
    """The model's own settings; a deployment config overrides them field by field."""
    trust_remote_code: bool = False
    lora_ranks: tuple[int, ...] = ()
    """Ranks of its enabled LoRA adapters."""


class Order(Struct, frozen=True, kw_only=True):
    """A deployment joined with its config and model: the whole input of a recipe that clients decide."""

    ref: Ref
    engine: Engine
    model_spec: DeployModelSpec
    executor: ExecutorConfig
    model: ModelOrder | None = None
    model_ref: Ref | None = None
    """What `model_spec` points at, whether it exists or not; None when it names no entity (a label, or nothing)."""

    @property
    def gpus(self) -> int:
        return self.executor.gpu

    @property
    def label(self) -> str | None:
        """The model name as the client wrote it, without a revision: `meta/llama-3.2-1b-instruct`."""
        name = (self.model_spec.model_name or "").partition("@")[0]
        if not name:
            return None
        return f"{self.model_spec.model_namespace}/{name}" if self.model_spec.model_namespace else name

    @property
    def chat(self) -> ChatOrder:
        """Chat template and tool calling: the model's, overridden field by field by the deployment config."""
        base, wish = self.model.chat if self.model else ChatOrder(), self.model_spec
        own = wish.tool_call_config or ToolCallConfig()
        auto = own.auto_tool_choice
        return ChatOrder(
            chat_template=wish.chat_template or base.chat_template,
            tools=ToolCallConfig(
                tool_call_parser=own.tool_call_parser or base.tools.tool_call_parser,
                tool_call_plugin=own.tool_call_plugin or base.tools.tool_call_plugin,
                auto_tool_choice=base.tools.auto_tool_choice if auto is None else auto,
            ),
        )

    @property
    def revision(self) -> str | None:
        """The revision asked for by `model_revision` or `name@rev`; None for the fileset's own."""
        return self.model_spec.model_revision or (self.model_spec.model_name or "").partition("@")[2] or None


class Script(Struct, frozen=True):
    """A tool parser: the one Python file of its fileset."""

    name: str
    content: str


class HostFacts(Struct, frozen=True, kw_only=True):
    """What a recipe may know about the machine."""

    nim_image: str
    vllm_image: str
    nim_cache_dir: str
    """Host directory under which every NIM image has a cache of its own."""
    loras_dir: str = ""
    """Host directory under which every model has a directory with its adapters."""
    files_dir: str = ""
    """Host directory of the files that are written for containers."""
    shm_bytes: int
    weights: Mount | None = None
    """The weights on this machine, to be mounted at WEIGHTS_DIR; None when the order needs none."""
    weights_path: str = WEIGHTS_DIR
    """Where inside the container the checkpoint's `config.json` is."""
    tool_parser: Script | None = None
    """The plugin that the order's tool calling names, once it has been read."""


def image_of(order: Order, default: str) -> str:
    """`image_name[:image_tag]`, the engine's default image when neither is set.

    Raises BadRequest for a tag without a name.
    """
    executor = order.executor
    if executor.image_name is None:
        if executor.image_tag is not None:
            raise BadRequest("executor_config.image_tag is set, but executor_config.image_name is not.")
        return default
    return executor.image_name if executor.image_tag is None else f"{executor.image_name}:{executor.image_tag}"


def adapters_mount(order: Order, host: HostFacts) -> Mount | None:
    """The directory of the model's adapters, when the config wants adapters; one subdirectory for each.

    A NIM serves whatever it finds there, so it has one that holds nothing else: see `host.adapter_files`.
    """
    if not order.model_spec.lora_enabled:
        return None
    owner = order.model.ref if order.model else order.ref
    root = f"{host.loras_dir}/nim" if order.engine == "nim" else host.loras_dir
    return Mount(source=f"{root}/{owner.workspace}--{owner.name}", target=ADAPTERS_DIR)


def mounts_of(order: Order, host: HostFacts, *more: Mount) -> tuple[Mount, ...]:
    """Weights and adapters where the order has them, then what an engine adds."""
    return tuple(mount for mount in (host.weights, adapters_mount(order, host), *more) if mount)


def repository_name(image: str) -> str:
    """`llm-nim` of `nvcr.io/nim/nvidia/llm-nim:1.13.1`."""
    return image.rpartition("/")[2].partition("@")[0].partition(":")[0]


def cache_name(image: str) -> str:
    """A directory name for an image: readable, unique, the same for every deployment of it."""
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', image)[:80]}-{hashlib.sha256(image.encode()).hexdigest()[:8]}"
