"""What this machine can never run, said before anything is stored. Pure."""

from __future__ import annotations

from nimhost.deployments.desired import Desired
from nimhost.errors import BadRequest


def check_wish(d: Desired, gpu_count: int, weights_problem: str | None) -> None:
    """Refuse a deployment that cannot work here.

    `gpu_count`: GPUs of this machine that nimhost may use; `weights_problem`: what is wrong with a directory of
    weights. Raises BadRequest, naming the field.
    """
    if d.problem is not None:
        raise BadRequest(d.problem)
    if d.gpus > gpu_count:
        there = f"{gpu_count} GPU{'' if gpu_count == 1 else 's'}" if gpu_count else "no GPU"
        raise BadRequest(
            f"executor_config.gpu: config '{d.entity.wish.config}' asks for {d.gpus}, this machine has {there}.",
            "See what is there with: nimhost gpus" if gpu_count else "Deploy without one: --gpu 0",
        )
    if weights_problem is not None:
        raise BadRequest(f"No weights to serve. {weights_problem}")
