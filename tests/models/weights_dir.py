"""A directory that looks like the weights of a real model: its config, and a safetensors header without the data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nimhost.models.checkpoint import read_spec


def make_weights_dir(directory: Path, config: Any) -> Path:
    """With as many parameters of 16 bits as the config stands for."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    parameters = read_spec(config).base_num_parameters
    tensors = {"all": {"dtype": "BF16", "shape": [parameters], "data_offsets": [0, parameters * 2]}}
    header = json.dumps(tensors).encode()
    (directory / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    return directory
