"""The download process: `python -m nimhost.host.weights.child`, one job as a JSON line on stdin, news on stdout.

A process, because a download must be stoppable at once: whoever started it kills it, and what was written stays for
the next one to continue. It ends by itself when its stdin does, so it does not outlive a killed daemon.
"""

from __future__ import annotations

import errno
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, as_completed, wait
from functools import partial
from pathlib import Path

import msgspec

from nimhost.errors import HostError, HubUnavailable, NimhostError, WeightsGated, WeightsMissing
from nimhost.host.weights import wire, xet
from nimhost.host.weights.cache import RepoCache, is_safe_path, looks_complete
from nimhost.host.weights.choice import HubFile, is_weights, pick_some, wanted
from nimhost.host.weights.disk import disk_full, keep_promise, missing_bytes, reserved_space
from nimhost.host.weights.hub import Hub
from nimhost.host.weights.meter import Meter
from nimhost.host.weights.ngc import open_registry
from nimhost.host.weights.transfer import FileTransfer

_REPORT_S = 0.25
_REFUSED_S = 2.0
"""Who is refused one file is refused the others soon, too."""


def main() -> None:
    job = wire.job_decoder.decode(sys.stdin.buffer.readline())
    threading.Thread(target=_die_with_parent, daemon=True).start()
    os.umask(0o022)
    try:
        line: wire.Line = wire.Done(download(job))
    except NimhostError as error:
        line = failed(error)
    except OSError as error:
        line = failed(_of_the_disk(error, Path(job.cache_dir)))
    _speak(line)
    os._exit(0)  # threads may still sit in a transfer that nobody wants any more


def download(job: wire.Job) -> str:
    """Bring the job's snapshot into the cache and return its commit. Raises NimhostErrors and OSErrors of the disk."""
    cache = RepoCache(Path(job.cache_dir), job.repo)
    known = _usable_without_hub(cache)
    limits = msgspec.structs.replace(job.limits, tries=2) if known else job.limits
    hub = open_registry(job.repo, job.endpoint, job.token, limits)
    try:
        commit = hub.commit(_say)
        chosen = _wanted(hub.tree(commit, _say), job.repo)
    except HubUnavailable:
        if known is None:
            raise
        cache.write_manifest(known, cache.files_there(known), verified=False)
        return known
    hub.limits = job.limits
    files = pick_some(job.repo, chosen, job.choice)
    with reserved_space(cache, files) as promise:  # for all of it: what no link leads to yet may be pruned without it
        cache.make_dirs()
        hashes = _fetch_all(job, hub, cache, commit, files, promise)
        cache.link(commit, files)
        cache.write_ref(commit)
        if files == chosen:  # some of them are no complete snapshot, and must not look like one
            cache.write_manifest(commit, files, verified=True, hashes=hashes)
    return commit


def failed(error: NimhostError) -> wire.Failed:
    retry_after_s = getattr(error, "retry_after_s", None)
    return wire.Failed(type(error).__name__, error.message, error.hint, retry_after_s)


def _usable_without_hub(cache: RepoCache) -> str | None:
    """The commit of a snapshot of another tool that looks complete, in case the hub cannot be asked about it."""
    commit = cache.commit()
    return commit if commit and looks_complete(cache.snapshot_dir(commit)) else None


def _wanted(tree: list[HubFile], repo: wire.Repo) -> list[HubFile]:
    unsafe = [file.path for file in tree if not is_safe_path(file.path)]
    if unsafe:
        raise HostError(
            f"{repo} has a file that would lie outside of the cache: {unsafe[0][:200]!r}",
            "Nothing of it was fetched. Whoever made that repository means no good, or made a mistake: use another.",
        )
    files = wanted(tree, repo.repo_type)
    if repo.repo_type == "model" and not any(is_weights(file.path) for file in files):
        ggufs = sum(file.path.endswith(".gguf") for file in tree)
        why = f"only {ggufs} GGUF files to choose from" if ggufs else "no weights"
        raise WeightsMissing(f"{repo} has {why}", "Deploy a repository with safetensors files.")
    return files


def _fetch_all(
    job: wire.Job, hub: Hub, cache: RepoCache, commit: str, files: list[HubFile], promise: int
) -> dict[str, str]:
    """All files, a few at a time, small ones first: they tell soonest that a repository is gated.

    `promise`: of `reserved_space`. Returns the hash of each, by digest.
    """
    unique = sorted({file.digest: file for file in files}.values(), key=lambda file: file.size_bytes)
    meter = Meter(sum(file.size_bytes for file in unique))
    stop = threading.Event()
    reporter = threading.Thread(target=_report, args=(meter, cache, unique, promise, stop), daemon=True)
    reporter.start()
    pool, through_xet = ThreadPoolExecutor(job.limits.parallel), partial(xet.bring, job, commit)
    try:
        transfers = {file.digest: FileTransfer(hub, cache, commit, file, meter, through_xet) for file in unique}
        working = {pool.submit(transfer.run): digest for digest, transfer in transfers.items()}
        try:
            return {working[done]: done.result() for done in as_completed(working)}
        except (WeightsGated, WeightsMissing):
            wait(working, _REFUSED_S)
            cache.remove_empty_dirs()
            raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        stop.set()
        reporter.join()


def _report(meter: Meter, cache: RepoCache, files: list[HubFile], promise: int, stop: threading.Event) -> None:
    while not stop.is_set():
        _speak(meter.read())
        keep_promise(promise, missing_bytes(cache, files))
        stop.wait(_REPORT_S)
    _speak(meter.read())


_mouth = threading.Lock()


def _speak(line: wire.Line) -> None:
    with _mouth:
        sys.stdout.buffer.write(wire.encode(line) + b"\n")
        sys.stdout.buffer.flush()


def _say(message: str) -> None:
    _speak(wire.WeightsProgress(0, 0, 0.0, message))


def _of_the_disk(error: OSError, cache_dir: Path) -> NimhostError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return disk_full(cache_dir)
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return HostError(
            f"cannot write the weights cache: {error}",
            f"Let this user write {cache_dir}, or set [weights] cache_dir to a directory of its own.",
        )
    return HostError(f"the weights cache failed: {error}")


def _die_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(1)


if __name__ == "__main__":
    main()
