"""The routes that are no plain CRUD of a kind as operations of OpenAPI, listed by hand. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from nimhost.api.openapi_kinds import BODY_ERRORS, JSON, VERBOSE, Operation, flag, query
from nimhost.api.schemas import NAME, NULL, OPEN, TEXT, components, nullable, record, ref
from nimhost.entities import Status
from nimhost.kinds import KINDS
from nimhost.tokens import SCOPES

Json = dict[str, Any]
EVENTS = "text/event-stream"  # without a schema: some readers hold it against the stream, some against each event
BYTES = "application/octet-stream"
PLAIN = "text/plain"


def of_platform() -> Iterator[Operation]:
    healths = {"status": {"enum": ["healthy", "degraded", "unhealthy"]}}
    services = record(
        {"ready": {"type": "array", "items": TEXT},
         "not_ready": {"type": "array", "items": record({"name": TEXT, "message": TEXT})}}
    )  # fmt: skip
    controllers = record(
        {"healthy": {"type": "boolean"}, "status": {"type": "object", "additionalProperties": {"type": "boolean"}}}
    )
    status = record({**healths, "services": services, "controllers": controllers}) | {"additionalProperties": True}
    gpus = record({"data": {"type": "array", "items": OPEN}})
    auth = record({"auth_enabled": {"type": "boolean"}, "oidc": NULL})
    for path, id, summary, schema in (
        ("/health/live", "health_live", "Whether it runs", record({"status": {"const": "live"}})),
        ("/health/ready", "health_ready", "Whether it answers", record({"status": {"const": "ready"}})),
        ("/status", "status", "How it is, and what is degraded", status),
        ("/cluster-info", "cluster_info", "Its version", record({"platform_version": TEXT, "revision": TEXT})),
        ("/apis/auth/discovery", "auth_discovery", "How to get a token", auth),
        ("/apis/nimhost/v1/host", "host", "What is known of the machine", OPEN),
        ("/apis/nimhost/v1/gpus", "gpus", "The GPUs, and who holds them", gpus),
        ("/openapi.json", "openapi", "This document", OPEN),
    ):  # fmt: skip
        yield Operation(path=path, method="GET", id=id, summary=summary, tag="platform", replies={200: {JSON: schema}})
    yield Operation(
        path="/metrics", method="GET", id="metrics", summary="What Prometheus scrapes", tag="platform",
        replies={200: {PLAIN: TEXT}},
    )  # fmt: skip
    yield Operation(
        path="/apis/nimhost/v1/requests", method="GET", id="list_requests", summary="The last requests to models",
        tag="platform", errors=(422,),
        replies={200: {JSON: record({"data": {"type": "array", "items": OPEN}, "dropped": {"type": "integer"}}),
                       EVENTS: {}}},
        query=(
            query("limit", {"type": "integer", "minimum": 0, "maximum": 2000}, "Only so many of the newest."),
            *(query(key, TEXT, f"Only those of this {key}.") for key in ("model", "provider", "adapter")),
            query("workspace", TEXT, "Only those of this workspace."),
            flag("failed", "Only those that failed."),
            flag("follow", "Stay, and send what comes."),
        ),
    )  # fmt: skip
    yield Operation(path="/", method="GET", id="root", summary="OK", tag="platform", replies={200: {PLAIN: TEXT}})


def of_others() -> Iterator[Operation]:
    yield from _of_files(f"{KINDS['filesets'].path('{workspace}')}/{{name}}")
    yield from _of_deployments(f"{KINDS['deployments'].path('{workspace}')}/{{name}}")
    yield from _of_adapters(f"{KINDS['models'].path('{workspace}')}/{{model}}/adapters")
    yield from _of_tokens("/apis/nimhost/v1/tokens")
    yield from _of_weights("/apis/nimhost/v1/weights")
    wish = {"config": ref("DeploymentConfigWish"), "fileset": nullable(ref("FilesetWish")), "workspace": TEXT}
    yield Operation(
        path="/apis/nimhost/v1/plan", method="POST", id="plan", summary="What would become of a deployment",
        tag="deployments", replies={200: {JSON: OPEN}}, errors=BODY_ERRORS, body={JSON: record(wish, ["config"])},
    )  # fmt: skip
    yield Operation(
        path="/apis/secrets/v2/rotate-encryption-keys", method="POST", id="rotate_encryption_keys", tag="secrets",
        summary="Put all secrets under a new key", errors=(409,),
        replies={202: {JSON: record({"rotated_secrets": {"type": "integer"}, "success": {"type": "boolean"}})}},
    )  # fmt: skip
    yield Operation(
        path=f"{KINDS['providers'].path('{workspace}')}/{{name}}/status", method="PUT", id="set_provider_status",
        summary="Say what a provider serves and how it is", tag="providers", replies={200: {JSON: ref("Provider")}},
        errors=(*BODY_ERRORS, 404, 409), body={JSON: _status_body()},
    )  # fmt: skip
    yield Operation(
        path=f"{KINDS['secrets'].path('{workspace}')}/{{name}}/access", method="GET", id="access_secret",
        summary="The value of a secret", tag="secrets", errors=(404,),
        replies={200: {JSON: record({"name": TEXT, "workspace": TEXT, "value": TEXT})}},
    )  # fmt: skip


def _of_weights(path: str) -> Iterator[Operation]:
    strings = {"type": "array", "items": TEXT}
    named = {"repo_id": TEXT, "revision": nullable(TEXT), "registry": {"enum": ["hub", "ngc"]},
             "repo_type": {"enum": ["model", "dataset", "space", "resource"]}, "endpoint": nullable(TEXT)}  # fmt: skip
    wanted = {**named, "secret": nullable(TEXT), "workspace": TEXT, "allow": strings, "ignore": strings}
    rows = {"type": "array", "items": OPEN}
    events: dict[int, Json | None] = {200: {EVENTS: {}}}
    yield Operation(
        path=path, method="GET", id="list_weights", summary="What the weights cache holds, and who uses it",
        tag="weights", replies={200: {JSON: record({"data": rows})}},
    )  # fmt: skip
    yield Operation(
        path=f"{path}/pull", method="POST", id="pull_weights", summary="Fetch weights ahead, and follow it",
        tag="weights", replies=events, errors=BODY_ERRORS, body={JSON: record(wanted, ["repo_id"])},
    )  # fmt: skip
    yield Operation(
        path=f"{path}/stop", method="POST", id="stop_pulling_weights", summary="End such a pull; what came stays",
        tag="weights", replies={200: {JSON: record({"repo": TEXT})}}, errors=(*BODY_ERRORS, 404),
        body={JSON: record(named, ["repo_id"])},
    )  # fmt: skip
    yield Operation(
        path=f"{path}/verify", method="POST", id="verify_weights", summary="Hash what is there anew", tag="weights",
        replies=events, errors=BODY_ERRORS, body={JSON: record(named, ["repo_id"])},
    )  # fmt: skip
    gone = {"data": rows, "freed_bytes": {"type": "integer"}, "kept": rows}
    yield Operation(
        path=f"{path}/prune", method="POST", id="prune_weights", summary="Remove what nimhost fetched and nobody uses",
        tag="weights", replies={200: {JSON: record(gone)}}, errors=BODY_ERRORS,
        body={JSON: record({"unused_for_s": {"type": "number", "minimum": 0}, "dry_run": {"type": "boolean"}}, [])},
    )  # fmt: skip


def _of_tokens(path: str) -> Iterator[Operation]:
    scopes = {"type": "array", "items": {"enum": [*SCOPES]}}
    token = {"name": TEXT, "scopes": scopes, "prefix": nullable(TEXT), "created_at": nullable(TEXT),
             "source": {"enum": ["database", "settings"]}}  # fmt: skip
    tokens = record({"data": {"type": "array", "items": record(token)}})
    yield Operation(
        path=path, method="GET", id="list_tokens", summary="List API tokens", tag="tokens",
        replies={200: {JSON: tokens}},
    )  # fmt: skip
    yield Operation(
        path=path, method="POST", id="create_token", summary="Make an API token, and see it this once", tag="tokens",
        replies={201: {JSON: record({**token, "token": TEXT})}}, errors=(*BODY_ERRORS, 409),
        body={JSON: record({"name": NAME, "scopes": scopes | {"minItems": 1}})},
    )  # fmt: skip
    yield Operation(
        path=f"{path}/{{name}}", method="DELETE", id="revoke_token", summary="Revoke an API token, at once",
        tag="tokens", replies={204: None}, errors=(404, 409),
    )  # fmt: skip


def _status_body() -> Json:
    served = nullable({"type": "array", "items": ref("ServedModel")})
    status, message = nullable({"enum": list(get_args(Status))}), nullable(TEXT | {"maxLength": 1000})
    id = nullable(TEXT | {"maxLength": 255})
    return record({"model_deployment_id": id, "served_models": served, "status": status, "status_message": message}, [])


def _of_adapters(base: str) -> Iterator[Operation]:
    """Below the model that they belong to."""
    full, dry = KINDS["adapters"], flag("dry_run", "Do it, say what it did, and undo it.")
    whole = {JSON: ref("Adapter")}
    create = components()["AdapterCreate"]
    fields = {key: value for key, value in create["properties"].items() if key != "model"}
    body = record(fields, [key for key in create["required"] if key != "model"])
    yield Operation(
        path=base, method="POST", id="create_adapter_of_model", summary="Create an adapter of a model", tag=full.key,
        replies={200: whole, full.create_code: whole}, errors=(*BODY_ERRORS, 404, 409), body={JSON: body},
        query=(dry,),
    )  # fmt: skip
    yield Operation(
        path=f"{base}/{{name}}", method="PATCH", id="update_adapter_of_model", tag=full.key,
        summary="Change the fields that are there", replies={200: whole}, errors=(*BODY_ERRORS, 404, 409),
        body={JSON: ref("AdapterUpdate")}, query=(dry, VERBOSE),
    )  # fmt: skip
    yield Operation(
        path=f"{base}/{{name}}", method="DELETE", id="delete_adapter_of_model", summary="Delete an adapter of a model",
        tag=full.key, replies={200: {JSON: ref("Deletion")}, full.delete_code: None}, errors=(404, 409, 422),
        query=(dry,),
    )  # fmt: skip


def _of_files(one: str) -> Iterator[Operation]:
    path, file = f"{one}/-/{{path}}", {JSON: ref("File")}
    under = query("path", TEXT, "Only those under it.")
    yield Operation(
        path=f"{one}/files", method="GET", id="list_files", summary="List the files of a fileset", tag="files",
        replies={200: {JSON: record({"data": {"type": "array", "items": ref("File")}})}}, errors=(400, 404),
        query=(under,),
    )  # fmt: skip
    yield Operation(
        path=path, method="GET", id="download_file", summary="The content of a file, or a range of it", tag="files",
        replies={200: {BYTES: {}}, 206: {BYTES: {}}}, errors=(400, 404, 416),
    )  # fmt: skip
    yield Operation(
        path=path, method="PUT", id="upload_file", summary="Write a file", tag="files", replies={200: file},
        errors=(400, 404, 408), body={BYTES: {}},
    )  # fmt: skip
    yield Operation(
        path=path, method="DELETE", id="delete_file", summary="Delete a file", tag="files", replies={200: file},
        errors=(400, 404),
    )  # fmt: skip


def _of_deployments(one: str) -> Iterator[Operation]:
    whole = {JSON: ref("Deployment")}
    models = record({"workspace": TEXT, "name": TEXT, "models": {"type": "array", "items": ref("ServedModel")}})
    follow = flag("follow", "Stay, and send what comes.")
    tail = query("tail", {"type": "integer", "minimum": 0}, "Only so many of the last lines.")
    status = {
        "status": {"enum": list(get_args(Status))}, "status_message": TEXT | {"maxLength": 1000},
        "model_provider_id": nullable(TEXT | {"maxLength": 255}),
    }  # fmt: skip
    yield Operation(
        path=f"{one}/status", method="POST", id="set_deployment_status", summary="Say how a deployment is",
        tag="deployments", replies={200: whole}, errors=(*BODY_ERRORS, 404, 409),
        body={JSON: record(status, ["status"])}, query=(query("version", {"type": "integer", "minimum": 1}),),
    )  # fmt: skip
    for verb, summary in (("stop", "Stop its engine and keep the rest"), ("start", "Start its engine again")):
        yield Operation(
            path=f"{one}/{verb}", method="POST", id=f"{verb}_deployment", summary=summary, tag="deployments",
            replies={200: whole}, errors=(404, 409),
        )  # fmt: skip
    yield Operation(
        path=f"{one}/logs", method="GET", id="deployment_logs", summary="What its engine wrote", tag="deployments",
        replies={200: {PLAIN: TEXT}}, errors=(404, 422), query=(tail, follow),
    )  # fmt: skip
    yield Operation(
        path=f"{one}/progress", method="GET", id="deployment_progress", summary="How far its preparation is",
        tag="deployments", replies={200: {JSON: ref("Progress"), EVENTS: {}}}, errors=(404, 422), query=(follow,),
    )  # fmt: skip
    yield Operation(
        path=f"{one}/plan", method="GET", id="deployment_plan", summary="What becomes of it, and why",
        tag="deployments", replies={200: {JSON: OPEN}}, errors=(404,),
    )  # fmt: skip
    yield Operation(
        path=f"{one}/models", method="GET", id="deployment_models", summary="What its engine serves",
        tag="deployments", replies={200: {JSON: models}}, errors=(404,),
    )  # fmt: skip


# --- the gateway, coarsely: what an engine or a provider answers is theirs ------------------------------------------


def of_gateway() -> Iterator[Operation]:
    base = "/apis/inference-gateway/v2/workspaces/{workspace}"
    card = record({"id": TEXT, "object": {"const": "model"}, "created": {"type": "integer"}, "owned_by": TEXT})
    cards = record({"object": {"const": "list"}, "data": {"type": "array", "items": card}})
    for prefix, word in (("/v1", "any_model"), (f"{base}/openai/-/v1", "workspace_model")):
        yield _ask(f"{prefix}/models", f"list_{word}s", "The models that can be asked", cards)
        yield _ask(f"{prefix}/models/{{model}}", f"get_{word}", "One of them", card)
    ready = record({"ready": {"const": True}, "provider": TEXT, "host_url": TEXT})
    yield _ask(f"{base}/provider/{{name}}/ready", "provider_ready", "Whether a provider can be asked", ready)
    for path, id, summary in (
        ("/v1/{path}", "ask_any_model", "OpenAI's routes, and Anthropic's v1/messages: the body names the model"),
        (f"{base}/openai/-/{{path}}", "ask_workspace_model", "The same for the models of one workspace"),
        (f"{base}/model/{{name}}/-/{{path}}", "ask_model", "Ask a model; its name in the body is put in"),
        (f"{base}/provider/{{name}}/-/{{path}}", "ask_provider", "Ask a provider; the body goes there as it is"),
    ):
        for method in ("GET", "POST", "PUT", "PATCH", "DELETE"):
            yield Operation(
                path=path, method=method, id=f"{id}_by_{method.lower()}", summary=summary, tag="gateway",
                replies={200: {"*/*": {}}}, errors=(400, 404, 413, 422),
                body={"*/*": {}} if method in ("POST", "PUT", "PATCH") else None,
            )  # fmt: skip


def _ask(path: str, id: str, summary: str, schema: Json) -> Operation:
    return Operation(
        path=path, method="GET", id=id, summary=summary, tag="gateway", replies={200: {JSON: schema}}, errors=(404, 422)
    )
