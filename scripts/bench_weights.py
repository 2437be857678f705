"""Downloads of weights against a stand-in of the hub that is throttled per connection, as the real one is.

Throughput next to huggingface_hub in the same run, for repositories of different shapes; bytes fetched twice after
`kill -9` at five points; a damaged part; a disk that fills up (as root: a tmpfs of limited size). It takes neither
network nor Docker.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from nimhost.errors import DiskFull
from nimhost.host.weights import Repo, Weights, WeightsProgress
from nimhost.host.weights.verify import verify
from tests.fakes.hub import FakeHub

MB = 10**6
REPO = Repo("org/big")
POINTS = (0.02, 0.3, 0.6, 0.9, 0.99)
HF = """
import sys
from huggingface_hub import snapshot_download
print(snapshot_download("org/big", cache_dir=sys.argv[1], endpoint=sys.argv[2], token=False))
"""
NIMHOST = """
import asyncio, sys
from pathlib import Path
from nimhost.host.weights import Repo, Weights
print(asyncio.run(Weights(Path(sys.argv[1]), sys.argv[2], False).fetch(Repo("org/big"), None, lambda p: None)).path)
"""


def content(total_bytes: int, files: int) -> dict[str, bytes]:
    """Weights that nobody could compress; the same for each run."""
    size = total_bytes // files
    block = hashlib.shake_256(b"weights").digest(1 << 20)
    found = {"config.json": b'{"model_type": "tiny"}'}
    for n in range(files):
        mixed = n.to_bytes(4) + block
        found[f"model-{n + 1:05}-of-{files:05}.safetensors"] = (mixed * (size // len(mixed) + 1))[:size]
    return found


def run(program: str, cache: Path, hub: FakeHub) -> float:
    began = time.monotonic()
    env = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    subprocess.run([sys.executable, "-c", program, str(cache), hub.url], check=True, stdout=subprocess.PIPE, env=env)
    return time.monotonic() - began


def compare(directory: Path, total_bytes: int, files: int, bytes_per_s: float | None) -> None:
    with FakeHub() as hub:
        made = content(total_bytes, files)
        hub.add("org/big", made)
        hub.faults.bytes_per_s = bytes_per_s
        size, seconds = sum(map(len, made.values())), {}
        for name, program in (("huggingface_hub", HF), ("nimhost", NIMHOST)):
            cache = directory / name
            seconds[name] = run(program, cache, hub)
            shutil.rmtree(cache)
    limit = f"{bytes_per_s / MB:.0f} MB/s per connection" if bytes_per_s else "not throttled"
    rates = ", ".join(f"{name} {size / MB / s:.0f} MB/s ({s:.1f} s)" for name, s in seconds.items())
    ratio = seconds["huggingface_hub"] / seconds["nimhost"]
    print(f"{size / MB:.0f} MB in {files:2} files, {limit}: {rates}: {ratio:.2f}x", flush=True)


def kill(directory: Path, total_bytes: int, files: int, bytes_per_s: float) -> None:
    with FakeHub() as hub:
        made = content(total_bytes, files)
        hub.add("org/big", made)
        hub.faults.bytes_per_s = bytes_per_s
        size = sum(map(len, made.values()))
        for point in POINTS:
            before = len(hub.served)
            process = subprocess.Popen([sys.executable, "-c", NIMHOST, str(directory / "cache"), hub.url])
            while hub.sent_bytes() < point * size:
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            process.wait()
            time.sleep(1)  # its child sees that it is alone, and the hub that nobody listens
            print(f"  kill -9 at {point:.0%}: {len(hub.served) - before} requests before it", flush=True)
        hub.faults.bytes_per_s = None
        run(NIMHOST, directory / "cache", hub)
        twice = hub.sent_bytes() - size
        worst = max(1, len(POINTS) * 8)
        print(f"  fetched twice in all: {twice / 2**20:.2f} MiB, {twice / worst / 2**20:.3f} MiB per killed connection")
        assert twice <= worst * 16 * 2**20
    shutil.rmtree(directory / "cache")


async def damage(directory: Path, total_bytes: int) -> None:
    with FakeHub() as hub:
        hub.add("org/big", content(total_bytes, 1))
        hub.faults.corrupt = 1
        notes: list[str] = []
        weights = Weights(directory / "cache", hub.url, False)
        await weights.fetch(REPO, None, lambda p: notes.append(p.message))
        said = next((note for note in notes if "damaged" in note), "not noticed")
        print(f"  one wrong byte in one part: {said} ({hub.sent_bytes() / MB:.0f} MB sent for {total_bytes / MB:.0f})")
        found = verify(directory / "cache", REPO, lambda done, total: None)
        assert not found.damaged, found.damaged
    shutil.rmtree(directory / "cache")


@contextmanager
def small_disk(directory: Path, size_bytes: int) -> Iterator[Path]:
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(directory)], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


async def fill(directory: Path, total_bytes: int, bytes_per_s: float) -> None:
    if os.geteuid():
        print("  disk full: not root, so no tmpfs of limited size can be mounted")
        return
    with FakeHub() as hub, small_disk(directory / "disk", int(total_bytes * 1.1)) as disk:
        hub.add("org/big", content(total_bytes, 2))
        hub.faults.bytes_per_s = bytes_per_s
        weights = Weights(disk / "cache", hub.url, False)
        filler = disk / "somebody-elses"

        def tell(progress: WeightsProgress) -> None:
            if progress.done_bytes > total_bytes // 3 and not filler.exists():
                filler.touch()
                with filler.open("wb") as file:
                    file.truncate(0)
                    os.posix_fallocate(file.fileno(), 0, total_bytes // 3)

        try:
            await weights.fetch(REPO, None, tell)
            print("  disk full: nothing happened")
        except DiskFull as error:
            print(f"  disk full: {error.message}. {error.hint}")
        filler.unlink()
        hub.faults.bytes_per_s = None
        await weights.fetch(REPO, None, lambda p: None)
        twice = hub.sent_bytes() - sum(map(len, content(total_bytes, 2).values()))
        print(f"  after making room: complete, {twice / 2**20:.2f} MiB fetched twice")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="scripts/bench weights"
    )
    parser.add_argument("--size-mb", type=int, default=2000, help="size of the repository [2000]")
    parser.add_argument("--rate-mb", type=float, default=20, help="MB/s that a connection gets [20]")
    chosen = parser.parse_args()
    size, rate = chosen.size_mb * MB, chosen.rate_mb * MB
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        for files, limit in ((1, rate), (4, rate), (16, rate), (4, None)):
            compare(directory, size, files, limit)
        kill(directory, size, 2, rate)
        asyncio.run(damage(directory, size // 4))
        asyncio.run(fill(directory, size // 4, rate))


if __name__ == "__main__":
    main()
