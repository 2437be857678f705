"""What would become of a deployment on this machine, and why, with every number. Pure: `observed` has been read.

The plan decides by the same functions (`preflight`, `placement`, `fit`), so that what is explained is what happens.
"""

from __future__ import annotations

from typing import Any

from nimhost.deployments.desired import Desired
from nimhost.deployments.driver import too_old
from nimhost.deployments.fit import fit_on, gpus_needed
from nimhost.deployments.need import need_of
from nimhost.deployments.observed import GpuSlot, Observed
from nimhost.deployments.placement import choose, free_bytes, obstacle, utilization, waiting
from nimhost.deployments.preflight import blocked, context_limit, image_needed, weights_needed
from nimhost.engines.check import warnings_of
from nimhost.models.memory import Fit

Json = dict[str, Any]
NO_SUM = "It would be started. Whether it fits shows when it runs."


def explanation(d: Desired, observed: Observed) -> Json:
    """`verdict`: "starts", "waits", "refused" (`reason` says why, `hint` what helps) or "unknown": without Docker, or
    where nothing is known about what it takes.

    `memory` is the sum for one GPU, None where nothing is known about the model. Sizes in bytes.
    """
    verdict, reason = _verdict(d, observed)
    problem, _, hint = reason.partition("\n")
    need = need_of(d, observed.gpus)
    chosen = choose(observed.gpus, need) if need.gpus and verdict != "refused" else ()
    found = _fit(d, observed, chosen)
    if verdict == "starts" and need.gpus and found is None:
        verdict, problem = "unknown", NO_SUM
    return {
        "verdict": verdict,
        "reason": problem or None,
        "hint": hint or None,
        "engine": d.order.engine if d.order else None,
        "image": d.image or None,
        "model": str(d.order.model.ref) if d.order and d.order.model else None,
        "memory": _memory(d, found) if found else None,
        "gpus": {
            "wanted": need.gpus,
            "share_bytes": need.share_bytes,
            "chosen": [slot.uuid for slot in chosen or ()],
            "utilization": utilization(chosen or (), need, d.ask),
            "there": [_gpu(slot, obstacle(slot, need)) for slot in observed.gpus],
        },
        "warnings": list(warnings_of(d.order)) if d.order else [],
        "disk": _disk(d, observed),
        "checks": _checks(d, observed),
    }


def _verdict(d: Desired, observed: Observed) -> tuple[str, str]:
    failure = d.run.failure if d.entity.wish.desired == "running" else None
    if failure is not None and failure.final:
        said = failure.message.replace("\n", " ")
        return "refused", f"It failed, and is not tried again: {said}\nTry again with: nimhost start {d.ref.name}"
    if d.problem:
        return "refused", d.problem
    if why := blocked(d, observed):
        return "refused", why
    if observed.docker_problem:
        return "unknown", observed.docker_problem
    need = need_of(d, observed.gpus)
    if need.gpus and choose(observed.gpus, need) is None:
        return "waits", waiting(observed.gpus, need, None)
    return "starts", ""


def _fit(d: Desired, observed: Observed, chosen: tuple[GpuSlot, ...] | None) -> Fit | None:
    """On the GPUs it would get; while there are none for it, on the largest."""
    slots = chosen or observed.gpus
    return fit_on(d.order, d.ask, [slot.total_bytes for slot in slots]) if d.order else None


def _memory(d: Desired, found: Fit) -> Json:
    assert d.order is not None
    assert d.ask is not None
    return {
        "fits": found.fits,
        "exact": found.exact,
        "gpu_bytes": found.gpu_bytes,
        "budget_bytes": found.budget_bytes,
        "weights_bytes": found.weights_bytes,
        "activation_bytes": found.activation_bytes,
        "graph_bytes": found.graph_bytes,
        "engine_bytes": found.overhead_bytes,
        "adapter_bytes": found.adapter_bytes,
        "kv_cache_bytes": found.kv_bytes,
        "kv_cache_bytes_per_token": found.kv_bytes_per_token,
        "need_bytes": found.need_bytes,
        "max_model_len": found.model_len,
        "largest_max_model_len": min(found.largest_model_len, context_limit(d.order) or found.largest_model_len),
        "tensor_parallel": found.tensor_parallel,
        "pipeline_parallel": found.pipeline_parallel,
        "gpus_needed": gpus_needed(d.order, d.ask, found.gpu_bytes),
    }


def _gpu(slot: GpuSlot, why_not: str | None) -> Json:
    return {
        "uuid": slot.uuid,
        "index": slot.index,
        "name": slot.name,
        "memory_bytes": slot.total_bytes,
        "free_bytes": free_bytes(slot),
        "obstacle": why_not,
    }


def _disk(d: Desired, observed: Observed) -> list[Json]:
    room = observed.rooms.get(d.ref)
    weights_here = d.weights is None or observed.weights.get(d.ref) is not None
    image_here = None if observed.docker_problem else observed.images.get(d.ref) is not None
    return [
        {
            "what": "weights",
            "here": weights_here,
            "path": room.weights_path if room and d.weights is not None else None,
            "needed_bytes": 0 if weights_here or room is None else weights_needed(d, room) or None,
            "free_bytes": room.weights_free_bytes if room else None,
        },
        {
            "what": "image",
            "here": image_here,
            "path": room.images_path if room else None,
            "needed_bytes": 0 if image_here else image_needed(d, observed) or None,
            "download_bytes": observed.downloads.get(d.ref) or None,
            "free_bytes": room.images_free_bytes if room else None,
        },
    ]


def _checks(d: Desired, observed: Observed) -> list[Json]:
    """What the preflight knows; `ok` is None where it knows nothing."""
    required = observed.requires.get(d.ref)
    driver = f"driver {observed.driver}, CUDA {observed.cuda}" if observed.driver else "no driver was found"
    needs = "what the image needs is known once it is here" if required is None else required or "nothing is asked"
    made_for, machine = observed.made_for.get(d.ref), observed.machine
    new_enough = too_old(required or "", observed.driver, observed.cuda) is None
    return [
        {"what": "Docker can hand out GPUs", "ok": observed.gives_gpus if d.gpus else None},
        {"what": f"NVIDIA driver: {driver}; {needs}", "ok": None if not (d.gpus and required) else new_enough},
        *([{"what": f"Image is made for {made_for}", "ok": made_for == machine}] if made_for and machine else []),
    ]
