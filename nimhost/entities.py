"""Every kind of thing nimhost remembers, and KINDS: the table that generates API, client and CLI.

A kind has two halves. The *wish* is what a client sets; the *status* is what the daemon found out. The API shows both
as one object; only the wish has versions, and only a changed wish wakes the reconciler.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from msgspec import Meta, Struct, field
from msgspec.structs import replace

from nimhost.errors import AlreadyExists, NotFound

Json = dict[str, Any]

# --- workspaces, secrets -------------------------------------------------------------------------------------------


class Wish(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a client sets. Unknown fields are refused, so that a misspelt one is not silently lost."""


class Nothing(Struct, frozen=True):
    """The status of a kind that has none."""


class Workspace(Wish, frozen=True, kw_only=True):
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
    description: str = ""
    project: str = ""
    metadata: FilesetMetadata = FilesetMetadata()
    custom_fields: Json = {}
    cache: bool = False


# --- models --------------------------------------------------------------------------------------------------------


class MoEConfig(Wish, frozen=True, kw_only=True):
    num_experts: int
    num_experts_per_tok: int
    num_expert_layers: int
    expert_ffn_size: int | None = None
    num_shared_experts: int = 0


class MambaConfig(Wish, frozen=True, kw_only=True):
    is_hybrid: bool
    num_mamba_layers: int
    num_attention_layers: int = 0
    num_mlp_layers: int = 0
    state_size: int = 16
    conv_kernel: int = 4


class SlidingWindowConfig(Wish, frozen=True, kw_only=True):
    window_size: int


class LinearLayerSpec(Wish, frozen=True, kw_only=True):
    name: str
    in_features: int
    out_features: int


class ToolCallConfig(Wish, frozen=True, kw_only=True):
    tool_call_parser: str | None = None
    tool_call_plugin: str | None = None
    auto_tool_choice: bool | None = None


class ModelSpec(Wish, frozen=True, kw_only=True):
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
    context_size: int | None = None
    num_virtual_tokens: int | None = None
    is_chat: bool | None = None
    is_embedding_model: bool = False
    moe_config: MoEConfig | None = None
    mamba_config: MambaConfig | None = None
    sliding_window_config: SlidingWindowConfig | None = None
    linear_layers: list[LinearLayerSpec] | None = None
    chat_template: str | None = None
    tool_call_config: ToolCallConfig | None = None
    minimum_gpus_all_weights: int | None = None
    minimum_gpus_lora: int | None = None


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


class InferenceParams(Struct, frozen=True, kw_only=True):
    model: str | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    top_p: float | None = None
    stop: list[str] | None = None


class Prompt(Wish, frozen=True, kw_only=True):
    system_prompt: str | None = None
    icl_few_shot_examples: str | None = None
    inference_params: InferenceParams | None = None
    system_prompt_template: str | None = None


class Model(Wish, frozen=True, kw_only=True):
    project: str | None = None
    description: str | None = None
    spec: ModelSpec | None = None
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


# --- deployment configs and deployments ----------------------------------------------------------------------------

Engine = Literal["nim", "vllm", "generic"]


class DeployModelSpec(Wish, frozen=True, kw_only=True):
    """The `model_spec` of a deployment config: which model, and how it formats chats and calls tools."""

    model_type: Literal["llm", "embed", "other"] | None = None
    model_namespace: str | None = None
    model_name: str | None = None
    model_revision: str | None = None
    chat_template: str | None = None
    tool_call_config: ToolCallConfig | None = None
    lora_enabled: bool = False


class ExecutorConfig(Wish, frozen=True, kw_only=True):
    gpu: Annotated[int, Meta(ge=0, le=1024)]
    disk_size: str = "50Gi"
    image_name: str | None = None
    image_tag: str | None = None
    health_check_path: str | None = None
    run_as_user: int | None = None
    run_as_group: int | None = None
    additional_envs: dict[str, str] | None = None
    additional_args: list[str] = []
    k8s_nim_operator_config: Json | None = None
    override_config: Json | None = None


class DeploymentConfig(Wish, frozen=True, kw_only=True):
    engine: Engine
    model_spec: DeployModelSpec
    executor_config: ExecutorConfig
    project: str | None = None
    description: str | None = None
    model_entity_id: str | None = None


class Deployment(Wish, frozen=True, kw_only=True):
    config: str
    config_version: int | None = None
    project: str | None = None
    desired: Literal["running", "stopped"] = "running"
    deleting: bool = False


Status = Literal["UNKNOWN", "CREATED", "PENDING", "READY", "ERROR", "DELETING", "DELETED", "LOST"]


class HistoryEntry(Struct, frozen=True):
    timestamp: str
    status: Status
    status_message: str


HISTORY_LIMIT = 100


class Failure(Struct, frozen=True, kw_only=True):
    """Why the last attempt did not work. `final`: only a changed wish, or a person who says `start`, can help."""

    message: str
    final: bool


class Run(Struct, frozen=True, kw_only=True):
    """How bringing a deployment up is going: what a restart of the daemon must not forget.

    Times are Unix times in seconds, 0 for never.
    """

    spec_hash: str = ""
    """The wish that all the rest belongs to; another wish starts from a fresh Run."""
    image_id: str | None = None
    """The image this wish was resolved to at its first start: a tag that moves later does not change it."""
    commit: str | None = None
    """The commit of the weights, likewise."""
    resolved: Json | None = None
    """The ContainerSpec, likewise: a new nimhost or a new default never changes what a wish became."""
    attempts: int = 0
    """Failures in a row."""
    retry_at: float = 0.0
    """No new attempt before this time."""
    failure: Failure | None = None
    started_at: float = 0.0
    """The last start of a container."""
    ready_at: float = 0.0
    """When `ready_container` became READY."""
    ready_container: str | None = None
    """The container that has been READY: tells an engine that broke from one that is still loading."""
    exited_container: str | None = None
    """The container whose exit is already counted in `attempts`."""
    waiting_since: float = 0.0
    """When it began to wait for GPUs: its place in the queue."""

    def forgiven(self) -> Run:
        """With nothing held against it: what a person gets who says stop or start."""
        return replace(self, attempts=0, failure=None, retry_at=0.0, waiting_since=0.0)


class DeploymentStatus(Struct, frozen=True, kw_only=True):
    status: Status = "CREATED"
    status_message: str = "Deployment created"
    status_history: list[HistoryEntry] = []
    model_provider_id: str | None = None
    run: Run = Run()

    def moved(self, status: Status, message: str, time: str) -> DeploymentStatus:
        """With another status and message, and the history that ends with them. The same ones change nothing."""
        if self.status_history and (self.status, self.status_message) == (status, message):
            return self
        history = [*self.status_history, HistoryEntry(time, status, message)][-HISTORY_LIMIT:]
        return replace(self, status=status, status_message=message, status_history=history)


# --- providers -----------------------------------------------------------------------------------------------------


class Provider(Wish, frozen=True, kw_only=True):
    host_url: str
    api_key_secret_name: str | None = None
    enabled_models: list[str] | None = None
    default_extra_body: Json | None = None
    default_extra_headers: dict[str, str] | None = None
    required_extra_body: Json | None = None
    required_extra_headers: dict[str, str] | None = None
    model_deployment_id: str | None = None
    auth_header_format: str | None = None
    project: str | None = None
    description: str | None = None


class ServedModel(Struct, frozen=True):
    model_entity_id: str
    served_model_name: str


class ProviderStatus(Struct, frozen=True, kw_only=True):
    status: Status = "CREATED"
    status_message: str = "Model provider created"
    served_models: list[ServedModel] = []
    host_url: str | None = None
    """Where a deployment's engine listens now; None: what the wish says."""


# --- the table -----------------------------------------------------------------------------------------------------


class Kind(Struct, frozen=True, kw_only=True):
    """One row of KINDS: everything the API, the client and the CLI need to know about a kind."""

    key: str
    """The word in URLs."""
    label: str
    """The word in sentences."""
    id_prefix: str
    service: str
    """`models` is served under `/apis/models/v2`."""
    wish: type[Wish]
    status: type[Struct] = Nothing
    in_workspace: bool = True
    updatable: tuple[str, ...] = ()
    """Fields an update may carry; empty: all."""
    update: Literal["PATCH", "PUT", "VERSION"] = "PATCH"
    """PATCH: the fields that are there. PUT: replaces, and creates. VERSION: POST to the name makes a new version."""
    upsert: bool = False
    create_code: int = 201
    delete_code: int = 204
    page_size: int = 100
    page_size_max: int = 1000
    pages_when_empty: int = 0
    """`total_pages` of an empty list."""
    sort: str | None = "created_at"
    sortable: tuple[str, ...] = ("name", "created_at", "updated_at")
    filterable: tuple[str, ...] = ()
    json_paths: dict[str, str] = {}
    """Where a filterable field is kept, if not under its own name."""
    secret: tuple[str, ...] = ()
    """Wish fields that the vault seals; never in a reply."""
    hidden: tuple[str, ...] = ()
    """Stored fields that no reply shows."""
    internal: tuple[str, ...] = ()
    """Wish fields that only nimhost sets."""
    settable_status: tuple[str, ...] = ()
    """Status fields that a create or replace may carry."""
    empty_for_null: tuple[str, ...] = ()
    """Text fields that replies show as "" rather than null."""
    kept: tuple[str, ...] = ()
    """Fields that an update keeps when it does not name them, though it replaces the rest."""
    list_nulls: bool = False
    """Lists show fields that are null."""
    fixed: Json = {}
    """Reply fields that never vary here, for clients that look for them."""
    has_id: bool = True
    missing: str = "{label} '{workspace}/{name}' not found"
    taken: str = "{label} with workspace '{workspace}' and name '{name}' already exists"
    cli: str
    """The command group, e.g. `inference providers`."""

    @property
    def versioned(self) -> bool:
        return self.update == "VERSION"

    def path(self, workspace: str) -> str:
        base = f"/apis/{self.service}/v2"
        return f"{base}/workspaces/{workspace}/{self.key}" if self.in_workspace else f"{base}/{self.key}"

    def not_found(self, workspace: str, name: str) -> NotFound:
        return NotFound(self.missing.format(label=self.label, workspace=workspace, name=name))

    def already_exists(self, workspace: str, name: str) -> AlreadyExists:
        return AlreadyExists(self.taken.format(label=self.label, workspace=workspace, name=name))


NOBODY: Json = {
    "principal_id": "", "principal_email": None, "principal_groups": [], "principal_on_behalf_of": None,
    "principal_on_behalf_of_groups": None, "principal_on_behalf_of_email": None,
}  # fmt: skip

KINDS: dict[str, Kind] = {
    kind.key: kind
    for kind in (
        Kind(
            key="workspaces", label="Workspace", id_prefix="workspace", service="entities", wish=Workspace,
            in_workspace=False, update="PUT", delete_code=200, sort="-created_at",
            sortable=("created_at", "updated_at"), filterable=("description",), list_nulls=True,
            fixed={"created_by": None, "updated_by": None},
            missing="Workspace '{name}' not found", taken="Workspace '{name}' already exists", cli="workspaces",
        ),
        Kind(
            key="secrets", label="Secret", id_prefix="secret", service="secrets", wish=Secret, page_size=10, sort=None,
            sortable=(), secret=("value",), has_id=False,
            missing="Secret {workspace}/{name} not found", taken="Secret '{workspace}/{name}' already exists",
            cli="secrets",
        ),
        Kind(
            key="filesets", label="Fileset", id_prefix="fileset", service="files", wish=Fileset, create_code=200,
            delete_code=200, page_size=10, page_size_max=100, sort="-created_at", sortable=("name", "created_at"),
            updatable=("description", "project", "purpose", "metadata", "custom_fields", "storage"),
            filterable=("description", "purpose", "storage_type"), json_paths={"storage_type": "storage.type"},
            hidden=("cache",), empty_for_null=("description", "project"),
            missing="Fileset '{name}' not found in workspace '{workspace}'",
            taken="Fileset '{workspace}/{name}' already exists", cli="files filesets",
        ),
        Kind(
            key="models", label="Model", id_prefix="model", service="models", wish=Model,
            filterable=("project", "base_model", "finetuning_type", "description", "fileset"), fixed={"adapters": []},
            missing="Model with workspace '{workspace}' and name '{name}' not found", cli="models",
        ),
        Kind(
            key="deployment-configs", label="Deployment config", id_prefix="model-deployment-config",
            service="models", wish=DeploymentConfig, update="VERSION", pages_when_empty=1, kept=("project",),
            filterable=("project", "model_entity_id", "description", "engine"), cli="inference deployment-configs",
        ),
        Kind(
            key="deployments", label="Deployment", id_prefix="model-deployment", service="models", wish=Deployment,
            status=DeploymentStatus, update="VERSION", delete_code=202, pages_when_empty=1,
            filterable=("project", "status", "config", "model_provider_id", "status_message"),
            hidden=("run", "deleting"), internal=("deleting",), kept=("project", "desired", "deleting"),
            fixed={"auth_context": NOBODY}, cli="inference deployments",
        ),
        Kind(
            key="providers", label="Model provider", id_prefix="model-provider", service="models", wish=Provider,
            status=ProviderStatus, update="PUT", upsert=True, settable_status=("status", "status_message"),
            sortable=("name", "created_at", "updated_at", "status"),
            filterable=("project", "status", "model_deployment_id", "description", "host_url"),
            fixed={"auth_context": NOBODY}, missing="Model provider not found: {workspace}/{name}",
            cli="inference providers",
        ),
    )
}  # fmt: skip


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
