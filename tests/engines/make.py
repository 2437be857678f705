"""Orders as a test needs them."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from nimhost.engines.order import HostFacts, ModelOrder, Order
from nimhost.engines.spec import Mount
from nimhost.entities import DeployModelSpec, ExecutorConfig, HuggingFaceStorage, ModelSpec
from nimhost.refs import Ref

HOST = HostFacts(
    nim_image="nvcr.io/nim/nvidia/llm-nim:1.13.1",
    vllm_image="vllm/vllm-openai:v1",
    nim_cache_dir="/data/nim-cache",
    loras_dir="/data/loras",
    files_dir="/data/container-files",
    shm_bytes=16 * 2**30,
)
WITH_WEIGHTS = replace(
    HOST, weights=Mount("/cache/models--org--m", "/model-store"), weights_path="/model-store/snapshots/abc"
)


def spec(**fields: Any) -> ModelSpec:
    values: dict[str, Any] = {
        "checkpoint_model_name": "X", "family": "qwen3", "num_layers": 28, "hidden_size": 2048,
        "num_attention_heads": 16, "num_kv_heads": 8, "ffn_hidden_size": 6144, "vocab_size": 151936,
        "tied_embeddings": True, "gated_mlp": True, "base_num_parameters": 1, "precision": "bfloat16",
    } | fields  # fmt: skip
    return ModelSpec(**values)


def model(name: str = "qwen3-1-7b", **fields: Any) -> ModelOrder:
    values: dict[str, Any] = {
        "ref": Ref("default", name),
        "fileset": Ref("default", name),
        "storage": HuggingFaceStorage(repo_id="org/m"),
    } | fields
    return ModelOrder(**values)


def order(
    engine: str,
    *,
    gpu: int = 1,
    with_model: ModelOrder | None = None,
    wish: dict[str, Any] | None = None,
    **executor: Any,
) -> Order:
    return Order(
        ref=Ref("default", "d"),
        engine=engine,  # type: ignore[arg-type]
        model_spec=DeployModelSpec(**(wish or {})),
        executor=ExecutorConfig(gpu=gpu, **executor),
        model=with_model,
    )
