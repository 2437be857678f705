"""Numbers as engines read them from their arguments. Pure."""

from __future__ import annotations

import re


def tokens(text: str | None) -> int | None:
    """A number as vLLM reads them (`4096`, `16k` = 16000, `16K` = 16384); 0 for `auto`; None for anything else."""
    if text in ("auto", "-1"):
        return 0
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,18})?)([kKmMgG]?)", text or "")
    if found is None:
        return None
    scale = {"": 1, "k": 10**3, "K": 2**10, "m": 10**6, "M": 2**20, "g": 10**9, "G": 2**30}[found[2]]
    return int(float(found[1]) * scale)
