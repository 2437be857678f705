"""Each deployment of the documentation, from its bodies to the container that is asked for: no daemon, no Docker."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from nimhost.deployments.desired import join
from nimhost.engines.check import check_order
from nimhost.engines.order import Script
from nimhost.engines.recipes import cook, needs_weights
from nimhost.engines.spec import Mount
from nimhost.entities import DeploymentConfig, Entity, ModelSpec, ToolCallConfig
from nimhost.kinds import KINDS
from nimhost.models.spec import described, inherited
from tests.engines.make import HOST, spec
from tests.spec_deployments import CASES, PARSER, VLLM, Case

FACTS = msgspec.structs.replace(HOST, vllm_image=VLLM)
PATH = "/model-store/snapshots/abc"
ROOT = Mount("/cache/models--org--m", "/model-store")


def row(kind: str, body: dict[str, Any], **fields: Any) -> Entity:
    body = dict(body)
    name = body.pop("name")
    wish = msgspec.convert(body, KINDS[kind].wish)
    values = {"id": name, "workspace": "default", "created_at": "", "updated_at": "", "status": KINDS[kind].status()}
    return Entity(kind=kind, name=name, wish=wish, **(values | fields))


def rows_of(case: Case, checkpoint: ModelSpec) -> list[Entity]:
    if case.model is None:
        return []
    fileset = row("filesets", case.fileset)
    model = row("models", {"name": case.model, "fileset": f"default/{case.model}"})
    status = described(model, checkpoint, inherited(model, fileset.wish, fileset.ref))
    return [fileset, row("models", {"name": case.model, "fileset": f"default/{case.model}"}, status=status)]


@pytest.mark.parametrize("late", [False, True], ids=["with spec", "before the spec is known"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_a_deployment_of_the_documentation_becomes(case: Case, late: bool) -> None:
    rows = rows_of(case, spec())
    if late:
        rows = [msgspec.structs.replace(r, status=KINDS[r.kind].status()) for r in rows]
    there = {(r.kind, r.workspace, r.name): r for r in rows}
    deployment = row("deployments", {"name": case.name, "config": "c"})
    config = msgspec.convert({k: v for k, v in case.config.items() if k != "name"}, KINDS["deployment-configs"].wish)
    assert isinstance(config, DeploymentConfig)

    desired = join(deployment, config, lambda *key: there.get(key), FACTS)

    assert desired.problem is None
    assert desired.order is not None
    facts = FACTS
    if needs_weights(desired.order, FACTS):
        facts = msgspec.structs.replace(facts, weights=ROOT, weights_path=PATH)
    plugin = desired.order.chat.tools.tool_call_plugin
    assert plugin is None or not late  # nobody has allowed it yet
    if plugin:
        facts = msgspec.structs.replace(facts, tool_parser=Script("my_parser.py", PARSER))
    if late and case.files:
        return
    made = check_order(desired.order, facts)
    env, args = case.filled(PATH)
    assert made == cook(desired.order, facts)
    assert (made.image, made.args, made.env, made.gpus) == (case.image, args, env, case.gpu)
    assert (*(m.target for m in made.mounts), *made.files) == case.mounts
    assert [m.target for m in made.mounts if not m.read_only] == [m for m in case.mounts if m == "/opt/nim/.cache"]
    assert made.files == case.files
    assert made.secret_env == ({"NGC_API_KEY": "system/ngc-api-key"} if case.engine == "nim" else {})
    assert made.warnings == ()


def test_a_deployment_overrides_the_fileset_field_by_field() -> None:
    override = next(case for case in CASES if case.name == "llama-tool-override")
    (_, model) = rows_of(override, spec())
    assert model.status.spec.tool_call_config == ToolCallConfig(tool_call_parser="llama3_json", auto_tool_choice=True)
