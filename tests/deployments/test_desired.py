from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from nimhost.deployments.desired import join, join_previous, model_ref
from nimhost.deployments.storage import HubWeights, LocalWeights
from nimhost.entities import (
    Deployment,
    DeploymentConfig,
    DeploymentStatus,
    DeployModelSpec,
    Entity,
    ExecutorConfig,
    Fileset,
    HuggingFaceStorage,
    LocalStorage,
    Model,
)
from nimhost.kinds import KINDS
from nimhost.refs import Ref
from nimhost.runs import Run
from tests.engines.make import HOST, spec

HUB = Fileset(storage=HuggingFaceStorage(repo_id="org/m", token_secret="hf"))


def row(kind: str, name: str, wish: Any, **fields: Any) -> Entity:
    return Entity(
        kind=kind,
        id=f"{kind}-{name}",
        workspace="default",
        name=name,
        created_at="",
        updated_at="",
        wish=wish,
        **({"status": KINDS[kind].status()} | fields),
    )


def config(engine: str = "vllm", executor: dict[str, Any] | None = None, **wish: Any) -> DeploymentConfig:
    wish = {"model_name": "default/mm"} | wish
    return DeploymentConfig(
        engine=engine,  # type: ignore[arg-type]
        model_spec=DeployModelSpec(**wish),
        executor_config=ExecutorConfig(**{"gpu": 1, **(executor or {})}),
    )


def joined(wish: DeploymentConfig | None, *rows: Entity, version: int = 1, run: Run | None = None) -> Any:
    there = {(r.kind, r.workspace, r.name): r for r in rows}
    deployment = row("deployments", "d", Deployment(config="c"), status=DeploymentStatus(run=run or Run()))
    return join(replace(deployment, version=version), wish, lambda *key: there.get(key), HOST)


@pytest.mark.parametrize(
    ("asked", "branch"),
    [({}, "main"), ({"model_revision": "c0ffee"}, "main"), ({"model_revision": "v2"}, None)],
)
def test_a_branch_is_remembered_only_for_the_commit_it_stood_for(asked: dict[str, Any], branch: str | None) -> None:
    """`refs/main` of a cache that others use, too, is not written for what another revision was resolved to."""
    pinned = HuggingFaceStorage(repo_id="org/m", revision="c0ffee", original_revision="main")
    found = joined(config(**asked), MODEL, row("filesets", "ff", Fileset(storage=pinned))).weights
    assert (found.revision, found.branch) == (asked.get("model_revision", "c0ffee"), branch)


def test_a_version_that_is_gone_is_not_called_a_config_that_is_gone() -> None:
    there = row("deployment-configs", "c", config())
    pinned = row("deployments", "d", Deployment(config="c", config_version=7), status=DeploymentStatus())
    found = join(pinned, None, lambda *key: there if key == ("deployment-configs", "default", "c") else None, HOST, 7)
    assert found.problem == "Deployment config 'c' has no version 7."


def test_a_directory_of_this_machine_has_no_revisions() -> None:
    local = row("filesets", "ff", Fileset(storage=LocalStorage(path="/w")))
    found = joined(config(model_revision="v2"), MODEL, local)
    assert found.problem.startswith("model_spec.model_revision is 'v2', but fileset 'default/ff' is a directory")
    assert joined(config(), MODEL, local).problem is None


MODEL = row("models", "mm", Model(fileset="default/ff"))
FILESET = row("filesets", "ff", HUB)


@pytest.mark.parametrize(
    ("wish", "expected"),
    [
        ({"model_namespace": "default", "model_name": "qq"}, Ref("default", "qq")),
        ({"model_name": "default/qq"}, Ref("default", "qq")),
        ({"model_name": "qq"}, Ref("here", "qq")),
        ({"model_name": "qq@abc"}, Ref("here", "qq")),
        ({"model_name": "a/b/c"}, None),
        ({}, None),
    ],
)
def test_model_ref(wish: dict[str, Any], expected: Ref | None) -> None:
    assert model_ref(DeployModelSpec(**wish), "here") == expected


def test_weights_come_from_the_filesets_repository() -> None:
    d = joined(config(), MODEL, FILESET)
    assert d.problem is None
    assert d.weights == HubWeights(
        repo_id="org/m", revision="main", repo_type="model", endpoint=None, token_secret=Ref("default", "hf")
    )


@pytest.mark.parametrize("wish", [{"model_revision": "v2"}, {"model_name": "default/mm@v2"}])
def test_a_revision_asked_for_replaces_the_filesets_own(wish: dict[str, Any]) -> None:
    assert joined(config(**wish), MODEL, FILESET).weights.revision == "v2"


def test_a_directory_is_used_where_it_is() -> None:
    local = row("filesets", "ff", Fileset(storage=LocalStorage(path="/models/x")))
    assert joined(config(), MODEL, local).weights == LocalWeights(directory="/models/x", fileset=Ref("default", "ff"))


@pytest.mark.parametrize(
    ("wish", "rows", "says"),
    [
        (None, [], "Deployment config 'c' does not exist"),
        (config(), [], "model entity default/mm does not exist"),
        (config(), [MODEL], "Fileset 'default/ff' of model default/mm does not exist"),
        (config(), [row("models", "mm", Model())], "Model default/mm has no fileset"),
        (config("nim"), [], "model entity default/mm does not exist"),
    ],
)
def test_a_missing_reference_is_named(wish: DeploymentConfig | None, rows: list[Entity], says: str) -> None:
    assert says in joined(wish, *rows).problem


def test_the_model_name_of_an_image_with_its_own_model_is_only_a_label() -> None:
    d = joined(config("nim", {"image_name": "nvcr.io/nim/meta/llama", "image_tag": "1"}, model_name="meta/llama-3.2"))
    assert (d.problem, d.weights) == (None, None)


def test_the_hash_is_of_what_a_client_decided() -> None:
    d = joined(config(), MODEL, FILESET)
    late_spec = row("models", "mm", Model(fileset="default/ff", spec=spec(), description="new"))
    assert joined(config(), late_spec, FILESET).hash == d.hash
    assert joined(config(executor={"additional_args": ["--x"]}), MODEL, FILESET).hash != d.hash
    assert joined(config(), MODEL, FILESET, version=2).hash != d.hash
    other = row("filesets", "ff", Fileset(storage=HuggingFaceStorage(repo_id="org/other")))
    assert joined(config(), MODEL, other).hash != d.hash


def test_a_new_field_with_a_default_would_not_restart_engines() -> None:
    explicit = config(lora_enabled=False, executor={"additional_args": [], "disk_size": "50Gi"})
    assert joined(explicit, MODEL, FILESET).hash == joined(config(), MODEL, FILESET).hash


def test_a_wish_that_ran_before_keeps_its_commit() -> None:
    first = joined(config(), MODEL, FILESET)
    again = joined(config(), MODEL, FILESET, run=Run(spec_hash=first.hash, commit="c0ffee"))
    assert again.weights.revision == "c0ffee"
    assert again.hash == first.hash


def test_the_previous_version_is_as_it_was_wished_and_resolved() -> None:
    """Its own wish and hash, its own GPUs and image; what has gone meanwhile is no problem for it."""
    run = Run(spec_hash="old", version=3, config_version=7, resolved={"image": "own/image:0"}, ready_container="c")
    d = joined(config(executor={"gpu": 2}), MODEL, FILESET, version=4)
    stopped = replace(d, entity=replace(d.entity, wish=replace(d.entity.wish, desired="stopped")))
    found = join_previous(stopped, run, Deployment(config="c", force=True), config(), lambda *_: None, HOST)
    assert (found.hash, found.image, found.gpus, found.run.spec_hash) == ("old", "own/image:0", 1, "old")
    assert (found.entity.version, found.config_version, found.entity.id) == (3, 7, d.entity.id)
    assert (found.weights, found.problem) == (None, None)
    assert (found.entity.wish.force, found.stopped) == (True, True)
    assert replace(d, previous=found).at("old") is found
    assert replace(d, previous=found).at(d.hash).entity.version == 4
