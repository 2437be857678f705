"""Where the files of a fileset are, as its storage says: pure."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from nimhost.entities import HuggingFaceStorage, LocalStorage, NgcStorage, Storage
from nimhost.refs import Ref


class HubWeights(Struct, frozen=True, kw_only=True):
    """Weights that are fetched: from a Hugging Face repository, or from NGC (then `repo_id` is `org/team/name`)."""

    repo_id: str
    revision: str
    repo_type: str
    endpoint: str | None
    token_secret: Ref | None
    branch: str | None = None
    """What `revision` was when the fileset was made, if it is the commit that this stood for then."""
    registry: Literal["hub", "ngc"] = "hub"


class LocalWeights(Struct, frozen=True, kw_only=True):
    """Weights in a directory of this machine: a fileset's own, or a user's by reference."""

    directory: str | None
    """None: where the file storage keeps the files of `fileset`."""
    fileset: Ref


Weights = HubWeights | LocalWeights


def ref_in(text: str | None, workspace: str) -> Ref | None:
    """`name` in `workspace`, or `workspace/name`; None for nothing."""
    if not text:
        return None
    first, slash, rest = text.partition("/")
    return Ref(first, rest) if slash else Ref(workspace, first)


def secret_of(storage: Storage) -> str | None:
    """The secret that opens it, as the storage names it."""
    match storage:
        case HuggingFaceStorage():
            return storage.token_secret
        case NgcStorage():
            return storage.api_key_secret
        case LocalStorage():
            return None


def origin_of(storage: Storage) -> str:
    """What its maker calls it: `Qwen/Qwen3-1.7B`, `nvidia/nemo/llama`; nothing for files of this machine."""
    match storage:
        case HuggingFaceStorage():
            return storage.repo_id
        case NgcStorage():
            return f"{storage.org}/{storage.team}/{storage.target}"
        case LocalStorage():
            return ""


def weights_in(fileset: Ref, storage: Storage, revision: str | None) -> Weights:
    """Where the files of a fileset are. `revision`: another one than its storage says."""
    match storage:
        case HuggingFaceStorage():
            used = revision or storage.revision
            return HubWeights(
                repo_id=storage.repo_id,
                revision=used,
                repo_type=storage.repo_type,
                endpoint=storage.endpoint,
                token_secret=ref_in(storage.token_secret, fileset.workspace),
                branch=storage.original_revision if used == storage.revision else None,
            )
        case NgcStorage():
            return HubWeights(
                repo_id=origin_of(storage),
                revision=revision or storage.version or "latest",
                repo_type=storage.target_type,
                endpoint=storage.host,
                token_secret=ref_in(storage.api_key_secret, fileset.workspace),
                registry="ngc",
            )
        case LocalStorage():
            return LocalWeights(directory=storage.path, fileset=fileset)
