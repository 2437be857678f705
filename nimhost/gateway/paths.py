"""Paths, pure: what a client asked the gateway for, and the address it is sent to, or why it is not.

Every decision is made on the decoded path, and what is sent is made from the very path that was decided on.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Literal, NamedTuple
from urllib.parse import quote, urlsplit

from nimhost.errors import BadRequest, Forbidden, NotFound

PREFIX = "/apis/inference-gateway/v2/workspaces/"
SHORT_PREFIX = "/v1/"
_KINDS = ("provider", "model", "openai")

PlaceKind = Literal["provider", "ready", "model", "openai", "short"]
Policy = Literal["vllm", "nim", "generic", "external"]


class Place(NamedTuple):
    """What the client asked for. `tail` is what stands after `/-/`, decoded; for `short` it begins with `v1/`."""

    kind: PlaceKind
    workspace: str
    name: str
    tail: str


def is_gateway_path(path: str) -> bool:
    """True if the decoded path belongs to the data plane."""
    if path.startswith(SHORT_PREFIX):
        return True
    if not path.startswith(PREFIX):
        return False
    _, _, kind = path[len(PREFIX) :].partition("/")
    return kind.startswith(("provider/", "model/", "openai/"))


def parse_place(path: str) -> Place:
    """Raises NotFound for what is no route of the gateway."""
    return (_cached_place if len(path) <= _CACHED_LENGTH else _parse_place)(path)


def _parse_place(path: str) -> Place:
    if path.startswith(SHORT_PREFIX):
        return Place("short", "default", "", path[1:])
    own = path[len(PREFIX) :] if path.startswith(PREFIX) else ""
    workspace, _, rest = own.partition("/")
    kind, _, rest = rest.partition("/")
    name, dash, tail = f"/{rest}".partition("/-/")
    name = name[1:]
    if not dash and name.endswith("/-"):
        name, dash = name[:-2], "/-"
    if kind == "provider" and not dash and name.endswith("/ready"):
        return Place("ready", workspace, name.removesuffix("/ready"), "")
    if dash and kind in _KINDS and (name != "") == (kind != "openai"):
        return Place(kind, workspace, name, tail)  # type: ignore[arg-type]
    raise NotFound("Not Found", "Inference routes are provider/NAME/-/PATH, model/NAME/-/PATH and openai/-/PATH.")


_CACHED_LENGTH = 200
_cached_place = lru_cache(maxsize=2048)(_parse_place)


# --- where it goes -------------------------------------------------------------------------------------------------

_SAFE = "/:@!$&'()*+,;=~-._"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


VLLM_PATHS = _words("""
    /health /ping /version /metrics /load /tokenize /detokenize /tokenizer_info /classify /pooling /score /rerank
    /generative_scoring /inference/v1/generate /v1/chat/completions /v1/chat/completions/batch
    /v1/chat/completions/render /v1/completions /v1/completions/render /v1/embeddings /v2/embed /v1/score /v1/rerank
    /v2/rerank /v1/classify /v1/responses /v1/messages /v1/messages/count_tokens /v1/audio/transcriptions
    /v1/audio/translations /v1/audio/speech /v1/images/generations /v1/images/edits /v1/images/variations /v1/models
    /v1/health/live /v1/health/ready /v1/metadata /v1/version /v1/license /v1/manifest /v1/metrics
""")
_WORD = re.compile(r"[a-z0-9_-]*")
VLLM_PREFIXES = ("/v1/models/", "/v1/responses/")

CONTROL_WORDS = _words("""
    load_lora_adapter unload_lora_adapter load_lora_adapter_from_tensors lora-adapters collective_rpc wake_up
    is_sleeping reset_prefix_cache reset_mm_cache reset_encoder_cache start_profile stop_profile scale_elastic_ep
    is_scaling_elastic_ep update_weights update_weights_from_disk update_weights_from_tensor
    update_weights_from_distributed update_weights_from_ipc update_weight_version start_weight_update
    finish_weight_update init_weights_update_group init_weight_transfer_engine destroy_weights_update_group
    release_memory_occupation resume_memory_occupation flush_cache pause_generation continue_generation
    set_internal_state configure_logging abort_request abort_requests freeze_gc systemsharedmemory cudasharedmemory
""")
"""Segments that only control endpoints of vLLM, SGLang, llama.cpp and Triton have, wherever they stand."""
CONTROL_PATHS = frozenset(
    f"{version}/{word}"
    for version in ("", "/v1")
    for word in _words("sleep pause resume is_paused shutdown server_info slots models/load models/unload")
)
CONTROL_PREFIXES = ("/v2/repository", "/v2/trace", "/v2/logging", "/slots/")


def target_url(base_url: str, policy: Policy, tail: str) -> str:
    """The URL that `tail` (decoded) is sent to, without the query.

    Raises BadRequest for a path that means different things to different servers, Forbidden for control endpoints of
    our engines, NotFound for a path that is no inference path of a vLLM engine.
    """
    compute = _cached_target_url if len(tail) <= _CACHED_LENGTH else _target_url
    return compute(base_url, policy, tail)


def _target_url(base_url: str, policy: Policy, tail: str) -> str:
    base = base_url.rstrip("/")
    _refuse_ambiguous(tail)
    if policy != "external":
        tail = _collapse(tail)
    if base.endswith("/v1") and f"{tail}/".startswith("v1/"):
        base = base.removesuffix("/v1")
    if policy != "external":
        _decide(policy, f"{urlsplit(base).path}/{tail}")
    return f"{base}/{quote(tail, safe=_SAFE)}"


_cached_target_url = lru_cache(maxsize=2048)(_target_url)


def _refuse_ambiguous(tail: str) -> None:
    if any(segment in (".", "..") for segment in tail.split("/")):
        raise BadRequest("The path must not have '.' or '..' segments.")
    if "\\" in tail or any(ord(char) < 0x20 or ord(char) == 0x7F for char in tail):
        raise BadRequest("The path must not have backslashes or control characters.")


def _collapse(tail: str) -> str:
    """Without empty segments; a slash at the end stays."""
    if "%" in tail:
        raise BadRequest("The path is percent-encoded twice.")
    path = "/".join(segment for segment in tail.split("/") if segment)
    return f"{path}/" if tail.endswith("/") and path else path


def _decide(policy: Policy, path: str) -> None:
    """Allow-list for vLLM, deny-list of control endpoints for NIM and generic images.

    A control endpoint is recognised in any case and with anything behind its name: `Sleep`, `sleep;x`, `sleep?`.
    """
    plain = path.rstrip("/")
    segments = [_WORD.match(segment.lower())[0] for segment in plain.split("/")]  # type: ignore[index]  # matches ""
    lower = "/".join(segments)
    if not CONTROL_WORDS.isdisjoint(segments) or lower in CONTROL_PATHS or lower.startswith(CONTROL_PREFIXES):
        raise Forbidden(
            f"'{path}' is a control endpoint of the engine: the gateway does not let it through.",
            "Change what an engine serves with nimhost itself: nimhost --help",
        )
    if policy == "vllm" and plain not in VLLM_PATHS and not plain.startswith(VLLM_PREFIXES):
        raise NotFound(
            f"'{path}' is not an inference path of a vLLM engine.",
            "Paths begin with v1/, as in v1/chat/completions.",
        )
