"""Short ways to say what is wanted and what is there, for the tests of the plan."""

from __future__ import annotations

from typing import Any

from msgspec.structs import replace

from nimhost.deployments.actions import Action
from nimhost.deployments.desired import Desired
from nimhost.deployments.observed import GpuSlot, Health, Instance, Located, Observed
from nimhost.deployments.plan import plan
from nimhost.deployments.retry import Limits
from nimhost.deployments.situation import Verdict
from nimhost.deployments.storage import LocalWeights
from nimhost.engines.order import Order
from nimhost.entities import Deployment, DeploymentStatus, DeployModelSpec, Entity, ExecutorConfig
from nimhost.refs import Ref
from nimhost.runs import Run

NOW = 1_000_000.0
LIMITS = Limits(
    start_timeout_s=600, start_limit=3, restart_limit=5, restart_backoff_s=2, unhealthy_restart_s=120,
    drain_timeout_s=60,
)  # fmt: skip
HASH = "aaaaaaaaaaaa"
OLD = "000000000000"


def wanted(
    name: str = "d",
    *,
    gpus: int = 1,
    created: int = 0,
    run: Run | None = None,
    status: str = "CREATED",
    hash: str = HASH,
    problem: str | None = None,
    weights: bool = False,
    **wish: Any,
) -> Desired:
    ref = Ref("default", name)
    return Desired(
        entity=Entity(
            kind="deployments",
            id=f"id-{name}",
            workspace="default",
            name=name,
            created_at=f"2026-01-01T00:00:{created:02d}Z",
            updated_at="",
            wish=Deployment(config="c", **wish),
            status=DeploymentStatus(status=status, run=run or Run(spec_hash=hash)),  # type: ignore[arg-type]
        ),
        order=Order(
            ref=ref, engine="generic", model_spec=DeployModelSpec(), executor=ExecutorConfig(gpu=gpus)
        ),
        image="image:1",
        weights=LocalWeights(directory="/w", fileset=Ref("default", "f")) if weights else None,
        hash=hash,
        problem=problem,
    )  # fmt: skip


def rolling(
    name: str = "d", *, gpus: int = 1, before: Run | None = None, previous_gpus: int = 1, run: Any = None, **fields: Any
) -> Desired:
    """A deployment whose version OLD was READY in container `old`, and whose wish is another one now."""
    before = before or was_ready()
    run = replace(run or Run(spec_hash=HASH), previous=before)
    d = wanted(name, gpus=gpus, run=run, status="READY", **fields)
    return replace(d, previous=wanted(name, gpus=previous_gpus, hash=OLD, run=before))


def was_ready(**fields: Any) -> Run:
    return Run(
        spec_hash=OLD, version=1, config_version=1, resolved={"image": "image:0"}, image_id="sha256:0",
        **{"ready_container": "old", "ready_at": NOW - 3600, **fields},
    )  # fmt: skip


def instance(name: str = "d", *, health: str = "ok", state: str = "running", **fields: Any) -> Instance:
    values: dict[str, Any] = {"id": f"container-{name}", "hash": HASH, "port": 4000, "started_at": NOW - 10} | fields
    return Instance(ref=Ref("default", name), state=state, health=Health(state=health), **values)  # type: ignore[arg-type]


def gpus(*holders: str | None) -> tuple[GpuSlot, ...]:
    return tuple(GpuSlot(uuid=f"GPU-{i}", index=i, holder=holder) for i, holder in enumerate(holders))


def machine(*instances: Instance, gpus: tuple[GpuSlot, ...] = gpus(None), **fields: Any) -> Observed:
    """Everything is prepared unless a test says otherwise."""
    everyone = [Ref("default", name) for name in ("a", "b", "c", "d")]
    values: dict[str, Any] = {
        "images": dict.fromkeys(everyone, "sha256:1"),
        "weights": dict.fromkeys(everyone, Located(source="/w")),
    } | fields
    return Observed(instances=instances, gpus=gpus, **values)


def decide(d: Desired, observed: Observed, in_flight: Action | None = None, now: float = NOW) -> Verdict:
    (verdict,) = plan([d], observed, {d.entity.id: in_flight} if in_flight else {}, now, LIMITS)
    return verdict


def again(d: Desired, verdict: Verdict) -> Desired:
    """The deployment as it is stored after a verdict."""
    status = replace(d.status, status=verdict.status, status_message=verdict.message, run=verdict.run)
    previous, run = d.previous, verdict.run.previous
    if previous is not None and run is not None:
        previous = replace(previous, entity=replace(previous.entity, status=replace(status, run=run)))
    return replace(d, entity=replace(d.entity, status=status), previous=previous if run else None)
