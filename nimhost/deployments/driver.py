"""Whether the driver of this machine is new enough for an image. Pure.

An image says what it needs in `NVIDIA_REQUIRE_CUDA`: alternatives between blanks, each a list of conditions between
commas ("Constraints" in
https://docs.nvidia.com/datacenter/cloud-native/container-toolkit/latest/docker-specialized.html). Only `cuda` and
`driver` are looked at: what kind of card `brand` and `arch` mean is NVIDIA's to say, and its own check at start has the
last word.
"""

from __future__ import annotations

import re
from operator import eq, ge, gt, le, lt, ne

REQUIRE, DISABLE = "NVIDIA_REQUIRE_CUDA", "NVIDIA_DISABLE_REQUIRE"
_COMPARE = {">=": ge, "<=": le, "!=": ne, ">": gt, "<": lt, "=": eq, "==": eq}
_CONDITION = re.compile(r"(cuda|driver)(>=|<=|!=|==|>|<|=)([0-9.]{1,40})")
NEWER_DRIVER = (
    "Update the NVIDIA driver (on Ubuntu: sudo ubuntu-drivers install, then reboot), or name an older image: "
    "--image NAME:TAG"
)


def requirement(env: dict[str, str]) -> str:
    """What the environment of an image asks of the driver; empty when nothing."""
    off = env.get(DISABLE, "").lower() in ("1", "true", "yes")
    return "" if off else env.get(REQUIRE, "")


def too_old(required: str, driver: str | None, cuda: str | None) -> str | None:
    """What is missing, in a sentence; None when an alternative holds, or too little is known to tell."""
    have = {"cuda": _version(cuda), "driver": _version(driver)}
    alternatives = [_CONDITION.findall(alternative) for alternative in required.split()]
    if not alternatives or any(all(_holds(c, have) for c in conditions) for conditions in alternatives):
        return None
    cuda_versions = [value for conditions in alternatives for name, _, value in conditions if name == "cuda"]
    needs = f"CUDA {cuda_versions[0]} or newer" if cuda_versions else required
    return f"needs {needs}; driver {driver} of this machine has CUDA {cuda}"


def _holds(condition: tuple[str, str, str], have: dict[str, tuple[int, ...] | None]) -> bool:
    name, sign, value = condition
    there, wanted = have[name], _version(value)
    return there is None or wanted is None or _COMPARE[sign](*_padded(there, wanted))


def _version(text: str | None) -> tuple[int, ...] | None:
    return tuple(int(part) for part in text.split(".") if part) if text and re.fullmatch(r"[\d.]+", text) else None


def _padded(there: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """`driver<471` is about 470.82 too: only as many parts are compared as the condition has."""
    size = len(wanted)
    return (there + (0,) * size)[:size], wanted
