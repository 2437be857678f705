"""What a checkpoint takes, found out once from its config and tensors, and remembered with its model."""

from __future__ import annotations

from msgspec import Struct


class KvLayers(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Layers that keep equally much of every token."""

    layers: int
    values: int
    """Numbers that one such layer keeps of one token: keys and values together."""
    heads: int
    """Into how many parts tensor parallelism can divide them; 1: every GPU keeps them all."""
    window: int | None = None
    """No older tokens than that are kept."""


class MemorySpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a checkpoint takes. Ours: the reference's spec has no such part."""

    weights_bytes: int
    """In GPU memory, as an engine holds them."""
    disk_bytes: int
    kv: list[KvLayers] = []
    kv_value_bytes: int = 2
    state_values: int = 0
    """Numbers kept per sequence, however long it is (state space layers)."""
    positions: int = 0
    """A longer context no engine takes: that many are in its config.json, with nothing that stretches them. 0: not
    known."""
    exact: bool = False
    """Counted from the tensors; else estimated from config.json."""
