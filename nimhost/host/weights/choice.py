"""Which files of a repository are worth downloading: pure, a table of what engines read and what only repeats it."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import PurePosixPath

from msgspec import Struct

from nimhost.errors import WeightsMissing
from nimhost.host.weights.wire import Choice, Repo


class HubFile(Struct, frozen=True):
    """One file as the hub lists it. `digest` is the SHA-256 of an LFS file (64 digits), the git SHA-1 of others (40).

    The digest is also the name of the file's blob in the cache; where no hash is told it is only that.
    """

    path: str
    size_bytes: int
    digest: str
    xet: bool = False

    @property
    def hashed(self) -> bool:
        """Whether its content can be verified."""
        return len(self.digest) in (40, 64)


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


def pick_some(repo: Repo, files: list[HubFile], choice: Choice) -> list[HubFile]:
    """Those of `files` that are chosen. A pattern is held against the whole path, `*` in it stands for slashes too, and
    one that ends in `/` for all below it, as in Hugging Face's tools. Raises WeightsMissing when that is none."""

    def among(path: str, patterns: tuple[str, ...]) -> bool:
        return any(fnmatch(path, f"{p}*" if p.endswith("/") else p) for p in patterns)

    allow, ignore = choice.allow, choice.ignore
    picked = [f for f in files if (not allow or among(f.path, allow)) and not among(f.path, ignore)]
    if not picked:
        asked = [*(f"--allow {p}" for p in allow), *(f"--ignore {p}" for p in ignore)]
        raise WeightsMissing(f"{repo} has no file left with {' '.join(asked)}", f"{_ITS_FILES}: {_few(files)}")
    return picked


_ITS_FILES = "Its files, without those that no engine reads"


def _few(files: list[HubFile]) -> str:
    names = [file.path for file in files]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


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
