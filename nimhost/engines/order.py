"""What a recipe is given: one deployment with everything it refers to, and the few facts of the host it may use."""

from __future__ import annotations

import hashlib
import re

from msgspec import Struct

from nimhost.engines.spec import WEIGHTS_DIR, Mount
from nimhost.entities import DeployModelSpec, Engine, ExecutorConfig, ModelSpec, Storage
from nimhost.errors import BadRequest
from nimhost.refs import Ref


class ModelOrder(Struct, frozen=True, kw_only=True):
    """The model entity of an order, reduced to what decides how it is served."""

    ref: Ref
    fileset: Ref | None = None
    storage: Storage | None = None
    """Where the fileset's files are; None while the fileset is missing."""
    spec: ModelSpec | None = None
    trust_remote_code: bool = False


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
    def revision(self) -> str | None:
        """The revision asked for by `model_revision` or `name@rev`; None for the fileset's own."""
        return self.model_spec.model_revision or (self.model_spec.model_name or "").partition("@")[2] or None


class HostFacts(Struct, frozen=True, kw_only=True):
    """What a recipe may know about the machine."""

    nim_image: str
    vllm_image: str
    nim_cache_dir: str
    """Host directory under which every NIM image has a cache of its own."""
    shm_bytes: int
    weights: Mount | None = None
    """The weights on this machine, to be mounted at WEIGHTS_DIR; None when the order needs none."""
    weights_path: str = WEIGHTS_DIR
    """Where inside the container the checkpoint's `config.json` is."""


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


def repository_name(image: str) -> str:
    """`llm-nim` of `nvcr.io/nim/nvidia/llm-nim:1.13.1`."""
    return image.rpartition("/")[2].partition("@")[0].partition(":")[0]


def cache_name(image: str) -> str:
    """A directory name for an image: readable, unique, the same for every deployment of it."""
    return f"{re.sub(r'[^A-Za-z0-9.]+', '-', image)[:80]}-{hashlib.sha256(image.encode()).hexdigest()[:8]}"
