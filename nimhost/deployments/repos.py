"""The repository that the weights of a fileset come from, as the weights cache names it."""

from __future__ import annotations

from typing import Any

from nimhost.deployments.storage import HubWeights, weights_in
from nimhost.host.weights.wire import Repo
from nimhost.refs import Ref


def repo_of(weights: HubWeights) -> Repo:
    return Repo(
        repo_id=weights.repo_id, revision=weights.revision, repo_type=weights.repo_type, endpoint=weights.endpoint,
        branch=weights.branch, registry=weights.registry,
    )  # fmt: skip


def repo_in(storage: Any) -> Repo | None:
    """None for files that lie on this machine."""
    where = weights_in(Ref("", ""), storage, None)
    return repo_of(where) if isinstance(where, HubWeights) else None
