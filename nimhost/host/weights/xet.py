"""Files that a hub has in Xet storage only, through Hugging Face's own library, which speaks its protocol.

The library neither resumes what a killed process left nor compares what it brought with the SHA-256 that the hub
promises, and it is silent for minutes when nothing comes: all of that is for us. It brings the file into a directory
of ours, so that nothing of it is left among other tools' files.

Only the download process uses this: it blocks.
"""

from __future__ import annotations

import errno
import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

from nimhost.errors import HubUnavailable
from nimhost.host.weights import wire
from nimhost.host.weights.choice import HubFile
from nimhost.host.weights.meter import Meter

_LOOK_S = 0.2
_TEXT = 500
_DISK = {f"os error {number}": number for number in (errno.ENOSPC, errno.EDQUOT)}
"""What the library says, without an errno, when the disk is full."""


def bring(job: wire.Job, commit: str, file: HubFile, meter: Meter, directory: Path) -> Path:
    """The file, in `directory`, which is ours alone; not verified.

    Raises HubUnavailable for what the library gives up at, or when nothing came for as long as all of our own tries
    together would take; OSError for a full disk.
    """
    shutil.rmtree(directory, ignore_errors=True)
    call = _Call(job, commit, file, meter, directory)
    meter.note(file.path, f"asking for {file.path} in Xet storage")
    call.start()
    limit_s = job.limits.stall_s * job.limits.tries
    while call.is_alive():
        call.join(_LOOK_S)
        if call.arrivals.quiet_s > limit_s:
            raise HubUnavailable(
                f"{job.repo}: no data of {file.path} from Xet storage for {limit_s:g} s",
                "Try again later: the other files are kept.",
            )
    meter.note(file.path)
    if call.failure is not None:
        call.arrivals.discard()
        raise _meaning(call.failure, job, file) from call.failure
    call.arrivals.complete()
    return directory / file.path


class _Call(threading.Thread):
    """The library's call, in a thread of its own: it cannot be ended, so nobody must have to wait for it."""

    def __init__(self, job: wire.Job, commit: str, file: HubFile, meter: Meter, directory: Path) -> None:
        super().__init__(daemon=True)
        self.arrivals = Arrivals(file, meter)
        self.failure: BaseException | None = None
        self._job = job
        self._commit = commit
        self._file = file
        self._directory = directory

    def run(self) -> None:
        from huggingface_hub import hf_hub_download

        repo, job = self._job.repo, self._job
        try:
            hf_hub_download(
                repo.repo_id, self._file.path, repo_type=repo.repo_type, revision=self._commit,
                local_dir=self._directory, endpoint=repo.endpoint or job.endpoint, token=job.token or False,
                tqdm_class=bar_of(self.arrivals),
            )  # fmt: skip
        except BaseException as error:  # noqa: BLE001  it is raised again where the file is waited for
            self.failure = error


class Arrivals:
    """How far a file is, told to the meter. The library counts twice: what it received, as it comes, and what it wrote,
    in a few big steps. Neither alone is how far it is: what is received may be packed, or be there already."""

    def __init__(self, file: HubFile, meter: Meter) -> None:
        self._file = file
        self._meter = meter
        self._received = self._written = self._told = 0
        self._last = time.monotonic()
        self._lock = threading.Lock()

    @property
    def quiet_s(self) -> float:
        return time.monotonic() - self._last

    def add(self, *, received: int = 0, written: int = 0) -> None:
        with self._lock:
            self._last = time.monotonic()
            self._received += received
            self._written += written
            self._tell(min(self._file.size_bytes, max(self._received, self._written)))
        self._meter.note(self._file.path)

    def complete(self) -> None:
        with self._lock:
            self._tell(self._file.size_bytes)

    def discard(self) -> None:
        """It was all for nothing."""
        with self._lock:
            self._meter.have(-self._told)
            self._told = 0

    def _tell(self, there: int) -> None:
        self._meter.receive(there - self._told)
        self._told = there


def bar_of(arrivals: Arrivals) -> type:
    """What the library takes for its `tqdm_class`: one that has `update_transfer` hears of bytes as they come
    (https://github.com/huggingface/huggingface_hub/issues/4633)."""

    class Bar:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.total: int | None = None

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def close(self) -> None:
            pass

        def update(self, n: float | None = 1) -> None:
            arrivals.add(written=int(n or 0))

        def update_transfer(self, n: float | None = 1) -> None:
            arrivals.add(received=int(n or 0))

        def set_postfix_str(self, *_: Any, **__: Any) -> None:
            pass

        def set_transfer_postfix_str(self, *_: Any, **__: Any) -> None:
            pass

    return Bar


def _meaning(error: BaseException, job: wire.Job, file: HubFile) -> Exception:
    """The hub itself has listed and granted the file: all but a full disk is trouble on the way, and may pass."""
    said = re.sub(r"\?\S+", "", str(error))[:_TEXT]  # the addresses of storage carry their permission
    for words, number in _DISK.items():
        if words in said or (isinstance(error, OSError) and error.errno == number):
            return OSError(number, "no space left")
    return HubUnavailable(
        f"{file.path} of {job.repo} did not come out of Xet storage: {said or type(error).__name__}",
        "Try again later: the other files are kept.",
    )
