"""How the layers of a checkpoint are made: the parts of a ModelSpec."""

from __future__ import annotations

from msgspec import Struct


class MoEConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    num_experts: int
    num_experts_per_tok: int
    num_expert_layers: int
    expert_ffn_size: int | None = None
    num_shared_experts: int = 0


class MambaConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    is_hybrid: bool
    num_mamba_layers: int
    num_attention_layers: int = 0
    num_mlp_layers: int = 0
    state_size: int = 16
    conv_kernel: int = 4


class SlidingWindowConfig(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    window_size: int


class LinearLayerSpec(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    name: str
    in_features: int
    out_features: int
