"""Every kind of thing nimhost remembers.

A kind has two halves. The *wish* is what a client sets; the *status* is what the daemon found out. The API shows both
as one object; only the wish has versions, and only a changed wish wakes the reconciler. `kinds.py` has the table.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field
from msgspec.structs import replace

from nimhost.layers import LinearLayerSpec, MambaConfig, MoEConfig, SlidingWindowConfig
from nimhost.refs import PROJECT
from nimhost.runs import Run, Serving, Update
from nimhost.sizes import MemorySpec

Json = dict[str, Any]
Text255 = Annotated[str, Meta(max_length=255)]
Text1000 = Annotated[str, Meta(max_length=1000)]
Text2048 = Annotated[str, Meta(max_length=2048)]
UnixId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
# A request may say less than a row may have: the rule is in the API.
ProjectPath = Annotated[str, Meta(max_length=255, extra_json_schema={"pattern": PROJECT})]

# --- workspaces, secrets -------------------------------------------------------------------------------------------


class Wish(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a client sets. Unknown fields are refused, so that a misspelt one is not silently lost."""


class Nothing(Struct, frozen=True):
    """The status of a kind that has none."""


class Workspace(Wish, frozen=True, kw_only=True):
    description: str | None = None


class Project(Wish, frozen=True, kw_only=True):
    description: str | None = None


class Secret(Wish, frozen=True, kw_only=True):
    value: str
    """Sealed by the vault before it is stored; never in a reply."""
    description: str | None = None


# --- filesets ------------------------------------------------------------------------------------------------------


class LocalStorage(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="local"):
    """Files in nimhost's own data directory, or (when allowed) in a directory of the user's, by reference."""

    path: str | None = None
    read_chunk_size: int = 1_048_576
    write_buffer_size: int = 16_777_216


class HuggingFaceStorage(
    Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="huggingface"
):
    repo_id: str
    repo_type: Literal["model", "dataset", "space"] = "model"
    revision: str = "main"
    original_revision: str | None = None
    token_secret: str | None = None
    endpoint: str | None = None
    read_chunk_size: int = 1_048_576


class NgcStorage(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type", tag="ngc"):
    org: str
    team: str
    target: str
    api_key_secret: str
    target_type: Literal["resource", "model"] = "resource"
    version: str | None = None
    original_version: str | None = None
    host: str = "https://api.ngc.nvidia.com"
    read_chunk_size: int = 1_048_576


Storage = LocalStorage | HuggingFaceStorage | NgcStorage


class FilesetMetadata(Wish, frozen=True, kw_only=True):
    dataset: Json | None = None
    model: Json | None = None


class Fileset(Wish, frozen=True, kw_only=True):
    storage: Storage = LocalStorage()
    purpose: Literal["generic", "dataset", "model"] = "generic"
    description: Text255 = ""
    project: str = ""
    metadata: FilesetMetadata = FilesetMetadata()
    custom_fields: Json = {}
    cache: bool = False


# --- models --------------------------------------------------------------------------------------------------------


class ToolCallConfig(Wish, frozen=True, kw_only=True):
    tool_call_parser: Text255 | None = None
    tool_call_plugin: Text255 | None = None
    auto_tool_choice: bool | None = None


class GivenSpec(Wish, frozen=True, kw_only=True):
    """What a user says of a model: as much as he likes. Null is what he does not say."""

    checkpoint_model_name: str | None = None
    family: str | None = None
    num_layers: int | None = None
    hidden_size: int | None = None
    num_attention_heads: int | None = None
    num_kv_heads: int | None = None
    ffn_hidden_size: int | None = None
    vocab_size: int | None = None
    tied_embeddings: bool | None = None
    gated_mlp: bool | None = None
    base_num_parameters: int | None = None
    precision: str | None = None
    context_size: int | None = None
    num_virtual_tokens: int | None = None
    is_chat: bool | None = None
    is_embedding_model: bool | None = None
    moe_config: MoEConfig | None = None
    mamba_config: MambaConfig | None = None
    sliding_window_config: SlidingWindowConfig | None = None
    linear_layers: list[LinearLayerSpec] | None = None
    chat_template: str | None = None
    tool_call_config: ToolCallConfig | None = None
    minimum_gpus_all_weights: int | None = None
    minimum_gpus_lora: int | None = None
    memory: MemorySpec | None = None


class ModelSpec(GivenSpec, frozen=True, kw_only=True):
    """What a model is. All that every model has is there."""

    checkpoint_model_name: str
    family: str
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    num_kv_heads: int
    ffn_hidden_size: int
    vocab_size: int
    tied_embeddings: bool
    gated_mlp: bool
    base_num_parameters: int
    precision: str
    is_embedding_model: bool = False


FinetuningType = Literal[
    "lora_merged", "all_weights", "last_layer", "top_layers", "gradual_unfreezing", "bias_only", "attention_only",
    "lora", "qlora", "adalora", "dora", "lora_plus", "prompt_tuning", "prefix_tuning", "p_tuning", "p_tuning_v2",
    "soft_prompt", "ppo", "dpo", "cdpo", "ipo", "orpo", "kto", "rrhf", "grpo",
]  # fmt: skip
BackendFormat = Literal["OPENAI_CHAT", "ANTHROPIC_MESSAGES"]


class ApiEndpoint(Wish, frozen=True, kw_only=True):
    url: str | None = None
    model_id: str | None = None
    api_key: str | None = None
    format: str | None = None


class Prompt(Wish, frozen=True, kw_only=True):
    system_prompt: str | None = None
    icl_few_shot_examples: str | None = None
    inference_params: Json | None = None
    """Any: the contract leaves it free."""
    system_prompt_template: str | None = None


class Model(Wish, frozen=True, kw_only=True):
    project: ProjectPath | None = None
    description: Text1000 | None = None
    spec: GivenSpec | None = None
    finetuning_type: FinetuningType | None = None
    fileset: str | None = None
    base_model: str | None = None
    api_endpoint: ApiEndpoint | None = None
    backend_format: BackendFormat | None = None
    prompt: Prompt | None = None
    custom_fields: Json = {}
    ownership: Json | None = None
    model_providers: list[str] = []
    trust_remote_code: bool = False


class ModelStatus(Struct, frozen=True, kw_only=True):
    """What the checkpoint of a model says about it. None of it is there for a model without a fileset."""

    spec: ModelSpec | None = None
    """The wish's spec with its gaps filled: `models.spec.spec_of` says when it is the one that counts."""
    spec_status: Literal["ready", "pending", "failed"] | None = None
    spec_message: str | None = None
    """What it waits for, or why it failed; None when it is ready."""
    spec_wish: str = ""
    """Hash of the part of the wish that all this was found out for."""
    spec_fileset: str | None = None
    """The fileset whose tool calling was handed down already."""


class Lora(Wish, frozen=True, kw_only=True):
    rank: int
    alpha: int | None = None


class Adapter(Wish, frozen=True, kw_only=True):
    """Weights on top of a model: loaded into whatever engine serves it. `model` is `workspace/name`."""

    model: str
    fileset: str
    finetuning_type: FinetuningType
    description: Text1000 | None = None
    enabled: bool = True
    lora_config: Lora | None = None


class VirtualModelRoute(Wish, frozen=True, kw_only=True):
    model: str
    backend_format: BackendFormat | None = None


class VirtualModel(Wish, frozen=True, kw_only=True):
    """Another name for a model. Every served model is one of its own accord (`autoprovisioned`)."""

    default_model_entity: str | None = None
    autoprovisioned: bool = False
    project: ProjectPath | None = None
    models: list[VirtualModelRoute] = []
    request_middleware: list[Json] = []
    response_middleware: list[Json] = []
    post_response_middleware: list[Json] = []
    override_proxy: str | None = None


# --- deployment configs and deployments ----------------------------------------------------------------------------

Engine = Literal["nim", "vllm", "generic"]


class DeployModelSpec(Wish, frozen=True, kw_only=True):
    """The `model_spec` of a deployment config: which model, and how it formats chats and calls tools."""

    model_type: Literal["llm", "embed", "other"] | None = None
    model_namespace: Text255 | None = None
    model_name: Text255 | None = None
    model_revision: Text255 | None = None
    chat_template: str | None = None
    tool_call_config: ToolCallConfig | None = None
    lora_enabled: bool = False


class ExecutorConfig(Wish, frozen=True, kw_only=True):
    gpu: Annotated[int, Meta(ge=0, le=1024)]
    gpu_memory_gib: Annotated[float, Meta(gt=0)] | None = None
    """A share of each GPU, which others may then share; None: all of it, for itself alone."""
    disk_size: str = "50Gi"
    image_name: str | None = None
    image_tag: str | None = None
    health_check_path: str | None = None
    run_as_user: UnixId | None = None
    run_as_group: UnixId | None = None
    additional_envs: dict[str, str] | None = None
    additional_args: list[str] = []
    k8s_nim_operator_config: Json | None = None
    override_config: Json | None = None


class DeploymentConfig(Wish, frozen=True, kw_only=True):
    engine: Engine
    model_spec: DeployModelSpec
    executor_config: ExecutorConfig
    project: ProjectPath | None = None
    description: Text1000 | None = None
    model_entity_id: Text255 | None = None


class Deployment(Wish, frozen=True, kw_only=True):
    config: str
    config_version: int | None = None
    project: ProjectPath | None = None
    desired: Literal["running", "stopped"] = "running"
    force: bool = False
    """Start it although the preflight says that it cannot work."""
    deleting: bool = False


Status = Literal["UNKNOWN", "CREATED", "PENDING", "READY", "ERROR", "DELETING", "DELETED", "LOST"]


class HistoryEntry(Struct, frozen=True):
    timestamp: str
    status: Status
    status_message: str


HISTORY_LIMIT = 100


class DeploymentStatus(Struct, frozen=True, kw_only=True):
    status: Status = "CREATED"
    status_message: str = "Deployment created"
    status_history: list[HistoryEntry] = []
    model_provider_id: str | None = None
    update: Update | None = None
    serving: Serving | None = None
    run: Run = Run()

    def moved(self, status: Status, message: str, time: str) -> DeploymentStatus:
        """With another status and message, and the history that ends with them. The same ones change nothing."""
        if self.status_history and (self.status, self.status_message) == (status, message):
            return self
        history = [*self.status_history, HistoryEntry(time, status, message)][-HISTORY_LIMIT:]
        return replace(self, status=status, status_message=message, status_history=history)


# --- providers -----------------------------------------------------------------------------------------------------


class Provider(Wish, frozen=True, kw_only=True):
    host_url: Text2048
    api_key_secret_name: str | None = None
    enabled_models: list[str] | None = None
    default_extra_body: Json | None = None
    default_extra_headers: dict[str, str] | None = None
    required_extra_body: Json | None = None
    required_extra_headers: dict[str, str] | None = None
    model_deployment_id: Text255 | None = None
    auth_header_format: Annotated[str, Meta(max_length=1024)] | None = None
    project: ProjectPath | None = None
    description: Text1000 | None = None


class ServedModel(Struct, frozen=True):
    model_entity_id: str
    served_model_name: str


NO_KEY = "No key yet: "  # begins the message of a provider whose secret does not exist: nothing has failed


class ProviderStatus(Struct, frozen=True, kw_only=True):
    status: Status = "CREATED"
    status_message: str = "Model provider created"
    served_models: list[ServedModel] = []
    host_url: str | None = None
    """Where a deployment's engine listens now; None: what the wish says."""


# --- rows -------------------------------------------------------------------------------------------------------------


class Entity(Struct, frozen=True, kw_only=True):
    """A stored row: one resource with both halves.

    `generation` counts changes of the wish; `version` counts the versions a client made (1 for kinds without).
    Times are RFC 3339 in UTC, with microseconds and a `Z`.
    """

    kind: str
    id: str
    workspace: str
    name: str
    generation: int = 1
    version: int = 1
    created_at: str
    updated_at: str
    wish: Any
    status: Any = field(default_factory=Nothing)

    @property
    def ref(self) -> str:
        return f"{self.workspace}/{self.name}"
