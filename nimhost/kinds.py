"""KINDS: everything the API, the client and the CLI need to know about each kind, as one table."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from nimhost.entities import (
    Adapter,
    Deployment,
    DeploymentConfig,
    DeploymentStatus,
    Fileset,
    Json,
    Model,
    ModelStatus,
    Nothing,
    Project,
    Provider,
    ProviderStatus,
    Secret,
    VirtualModel,
    Wish,
    Workspace,
)
from nimhost.errors import AlreadyExists, NotFound


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
    source: str = "entities"
    """The table or view that has the rows."""
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
    presence: tuple[str, ...] = ()
    """Filterable fields of which `true` and `false` ask whether there is one."""
    nested: dict[str, str] = {}
    """Filters with a key inside, and the filterable field that means: `base_model.name` is `base_model`."""
    related: tuple[str, ...] = ()
    """Filterable fields that are kept in rows of other kinds."""
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

    def already_exists(self, workspace: str, name: str, model: str = "") -> AlreadyExists:
        """`model`: of an adapter, the model it was to belong to."""
        return AlreadyExists(self.taken.format(label=self.label, workspace=workspace, name=name, model=model))


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
            key="projects", label="Project", id_prefix="project", service="entities", wish=Project, update="PUT",
            delete_code=200, sort="-created_at", filterable=("description",), cli="projects",
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
            status=ModelStatus, hidden=("spec_wish", "spec_fileset"),
            filterable=(
                "project", "base_model", "adapters", "finetuning_type", "prompt", "lora_enabled", "description",
                "fileset",
            ),
            presence=("base_model", "adapters", "finetuning_type", "prompt"),
            nested={"base_model.name": "base_model", "adapters.finetuning_type": "adapters.finetuning_type"},
            related=("adapters", "adapters.finetuning_type", "lora_enabled"), fixed={"adapters": []},
            missing="Model with workspace '{workspace}' and name '{name}' not found", cli="models",
        ),
        Kind(
            key="adapters", label="Adapter", id_prefix="adapter", service="models", wish=Adapter, has_id=False,
            updatable=("description", "enabled", "fileset"),
            filterable=("model", "description", "fileset", "finetuning_type", "enabled"),
            missing="Adapter with workspace '{workspace}' and name '{name}' not found",
            taken="Model adapter already exists: {model}/{name}", cli="adapters",
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
        Kind(
            key="virtual-models", label="Virtual model", id_prefix="virtual-model", service="inference-gateway",
            wish=VirtualModel, source="virtual_models", page_size=20, page_size_max=200, sort="-created_at",
            filterable=("project", "default_model_entity", "autoprovisioned"),
            fixed={"created_by": None, "updated_by": None, "parent": None},
            taken="Virtual model '{workspace}/{name}' already exists", cli="inference virtual-models",
        ),
    )
}  # fmt: skip
