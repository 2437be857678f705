"""Which files of a repository are worth downloading: pure, a table of what engines read and what only repeats it."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import PurePosixPath

from msgspec import Struct


class HubFile(Struct, frozen=True):
    """One file as the hub lists it. `digest` is the SHA-256 of an LFS file (64 digits), the git SHA-1 of others (40).

    The digest is also the name of the file's blob in the cache.
    """

    path: str
    size_bytes: int
    digest: str
    xet: bool = False


SAFETENSORS = ("*.safetensors",)
TORCH = ("*.bin", "*.pt", "*.pth", "*.ckpt")
FOREIGN = ("*.msgpack", "*.h5", "*.ot", "*.onnx", "*.onnx_data*", "*.tflite", "*.mlmodel", "*.llamafile")
"""Weights for frameworks that no engine of ours runs."""
GGUF = ("*.gguf",)
SIDE_DIRS = ("original", "metal", "onnx", "openvino", "coreml", "runs", "checkpoint-*", "global_step*", "*.mlpackage")
"""Folders that hold the same weights in another form, or what training left behind."""
TRAINING = ("training_args.bin", "optimizer.*", "scheduler.pt", "rng_state*", "trainer_state.json")
MEDIA = (".git*", "*.png", "*.jpg", "*.jpeg", "*.gif", "*.svg", "*.webp", "*.mp4", "*.pdf")


def choose_files(tree: list[HubFile]) -> list[HubFile]:
    """The files of `tree` to fetch, in its order: weights once, in the best format there is, and all that is small.

    1. Never: folders of duplicates, left-overs of training, pictures.
    2. Per folder, safetensors win over PyTorch pickles (`.bin`, `.pt`, `.pth`); other frameworks' formats never go.
       Where a pickle is all there is, it is kept, so that adapters and old checkpoints work.
    3. Mistral's `consolidated*.safetensors` repeat `model*.safetensors` where both are there.
    4. GGUF only where there are no other weights and there is no choice to make between quantisations.
    """
    files = [f for f in tree if not _useless(f.path)]
    safe = {_folder(f.path) for f in files if _is(f.path, SAFETENSORS)}
    sharded = {_folder(f.path) for f in files if _is(f.path, ("model*.safetensors",))}
    kept = [
        f
        for f in files
        if not _is(f.path, (*FOREIGN, *GGUF))
        and not (_is(f.path, (*TORCH, "*.bin.index.json")) and _folder(f.path) in safe)
        and not (_is(f.path, ("consolidated*.safetensors*",)) and _folder(f.path) in sharded)
    ]
    ggufs = [f for f in files if _is(f.path, GGUF)]
    if len(ggufs) == 1 and not any(is_weights(f.path) for f in kept):
        kept += ggufs
    return kept


def wanted(tree: list[HubFile], repo_type: str) -> list[HubFile]:
    """What we fetch of a repository: a choice of a model's files, everything of a dataset."""
    return choose_files(tree) if repo_type == "model" else tree


def is_weights(path: str) -> bool:
    return _is(path, (*SAFETENSORS, *TORCH, *GGUF))


def _useless(path: str) -> bool:
    folders = PurePosixPath(path).parts[:-1]
    return _is(path, (*TRAINING, *MEDIA)) or any(fnmatch(part, side) for part in folders for side in SIDE_DIRS)


def _is(path: str, patterns: tuple[str, ...]) -> bool:
    name = PurePosixPath(path).name
    return any(fnmatch(name, pattern) for pattern in patterns)


def _folder(path: str) -> str:
    return str(PurePosixPath(path).parent)
