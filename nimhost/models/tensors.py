"""The tensors of a checkpoint: the headers of its safetensors files, and what follows from shapes and types. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Annotated

import msgspec
from msgspec import Meta, Raw, Struct

from nimhost.layers import LinearLayerSpec

MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors format itself."""
MAX_PARAMETERS = 2**53
"""More than anybody could store, and what every reader of JSON still keeps exactly."""


class Tensor(Struct, frozen=True):
    dtype: str
    """As safetensors writes it: `BF16`, `F8_E4M3`, `I32`..."""
    shape: tuple[int, ...]
    end: int
    """Offset of its end, counted from the end of the header."""


def header_length(first_bytes: bytes) -> int:
    """How many bytes of JSON follow the first eight of a safetensors file. Raises ValueError if it is none."""
    length = int.from_bytes(first_bytes[:8], "little")
    if len(first_bytes) < 8 or not 2 <= length <= MAX_HEADER_BYTES:
        raise ValueError("it does not begin with the length of a header")
    return length


class _Entry(Struct):
    """What a header says of a tensor."""

    dtype: str
    shape: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=16)]
    data_offsets: tuple[int, int]

    def tensor(self) -> Tensor:
        if prod(self.shape) > MAX_PARAMETERS:
            raise ValueError(f"no tensor has the shape {list(self.shape)}")
        return Tensor(self.dtype, self.shape, self.data_offsets[1])


_entries = msgspec.json.Decoder(dict[str, Raw])
_entry = msgspec.json.Decoder(_Entry)


def parse_safetensors_header(header: bytes) -> dict[str, Tensor]:
    """The tensors by name. Raises ValueError for anything but a safetensors header."""
    try:
        entries = _entries.decode(header)
        entries.pop("__metadata__", None)
        return {name: _entry.decode(entry).tensor() for name, entry in entries.items()}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not a safetensors header: {error}") from error


def weights_end(tensors: Mapping[str, Tensor]) -> int:
    """Bytes that follow the header in a whole file."""
    return max((tensor.end for tensor in tensors.values()), default=0)


# --- what they tell ---------------------------------------------------------------------------------------------------

NOT_WEIGHTS = (
    "scales", "_scale", "_scale_inv", "_scale_2", "qzeros", "zero_point", "g_idx", "weight_shape", "inv_freq",
    "absmax", "quant_map", "quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4", "position_ids",
)  # fmt: skip
"""Ends of names of what quantisation and buffers add to the real parameters."""
PACKED = {"I32": 32, "U8": 8}
"""Types that quantised checkpoints pack several weights into, and their bits."""


def count_parameters(tensors: Mapping[str, Tensor], bits: int | None, *, tied: bool = False) -> int:
    """How many parameters the tensors stand for. `bits` per weight where they are quantised."""
    total = 0
    for name, tensor in tensors.items():
        if name.endswith(NOT_WEIGHTS) or (tied and name == "lm_head.weight"):
            continue
        packed = PACKED.get(tensor.dtype, 0) // bits if bits else 1
        total += prod(tensor.shape) * max(1, packed)
    return total


PLAIN = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I8")
"""Types that are not packed: the tensor has the shape of the layer."""
NOT_LINEAR = ("embed", "wte", "wpe", "norm", "conv1d", "relative_attention_bias")


def linear_layers(tensors: Mapping[str, Tensor], *, transposed: bool = False) -> list[LinearLayerSpec]:
    """The linear layers with their dimensions, in the order of their names.

    Not among them: experts (adapters are not made for them, and there are tens of thousands), and layers whose weights
    are packed, which do not show their shape.
    """
    layers = []
    for name, tensor in sorted(tensors.items(), key=lambda item: _natural(item[0])):
        module = name.removesuffix(".weight")
        plain = tensor.dtype in PLAIN and len(tensor.shape) == 2 and module != name
        if plain and ".experts." not in name and not any(word in name.lower() for word in NOT_LINEAR):
            out_features, in_features = tensor.shape[::-1] if transposed and "lm_head" not in name else tensor.shape
            layers.append(LinearLayerSpec(name=module, in_features=in_features, out_features=out_features))
    return layers


def _natural(name: str) -> list[tuple[int, str]]:
    """Layer 10 comes after layer 9."""
    return [(int(part), "") if part.isdecimal() and len(part) < 19 else (-1, part) for part in name.split(".")]
