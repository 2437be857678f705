"""What the gateway costs, beside doing without one, nginx and LiteLLM (where installed), in one run on one machine.

Rounds are interleaved (each target in each round) and medians are shown. CPU time is the proxy process's own, all its
threads, so that a busy machine blurs it little; what is "added" to times is measured against the engine itself. nimhost
runs as the daemon does: behind its server and its gate, model looked up and rewritten. A reply that is not 200, is
missing, or differs from the engine's by one byte makes the run void (exit 1).
"""

from __future__ import annotations

import argparse
import json
import os
import secrets
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GATEWAY_PATH = "/apis/inference-gateway/v2/workspaces/default/openai/-/v1/chat/completions"
PLAIN_PATH = "/v1/chat/completions"
NGINX = """
daemon off; master_process off; pid {dir}/nginx.pid; error_log {dir}/error.log;
events {{ worker_connections 8192; }}
http {{
  access_log off; client_body_temp_path {dir}; proxy_temp_path {dir}; fastcgi_temp_path {dir};
  uwsgi_temp_path {dir}; scgi_temp_path {dir}; client_body_buffer_size 1m; client_max_body_size 50m;
  upstream engine {{ server 127.0.0.1:{engine}; keepalive 2048; keepalive_requests 10000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=2048; keepalive_requests 10000000;
    proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off;
    location / {{ proxy_pass http://engine; }}
  }}
}}
"""
HOW_TO_LITELLM = (
    "It wants an environment of its own: python3 -m venv DIR && DIR/bin/pip install 'litellm[proxy]', "
    "then --litellm DIR/bin/litellm"
)
LITELLM = """
model_list:
  - model_name: default/bench
    litellm_params: {{model: openai/bench-served, api_base: "http://127.0.0.1:{engine}/v1", api_key: none}}
"""


@dataclass
class Target:
    name: str
    port: int
    path: str = PLAIN_PATH
    exact: bool = True
    pid: int | None = None
    """None: no proxy, nothing to measure."""
    share: float = 1.0
    """Of the requests, for what is too slow for all of them."""
    most_connections: int = 1_000_000
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Load:
    """`unit` is what CPU time is divided by: a request or a chunk."""

    name: str
    connections: int
    requests: int
    chunks: int = 0
    pause_ms: float = 0.0
    prompt_bytes: int = 100

    @property
    def unit(self) -> str:
        return "chunk" if self.chunks else "request"


def loads(args: argparse.Namespace) -> list[Load]:
    """The last but one has an aim of its own: see `verdicts`."""
    n = args.requests
    found = [
        Load("1 connection", 1, n // 4),
        Load("32 connections", 32, n),
        Load("256 connections", 256, n),
        Load("32 connections, 100 KB", 32, n // 4, prompt_bytes=100_000),
        Load("128 streams x 100", 128, 128, 100, 20.0),
        Load("1000 streams, 10/s", 1000, 1000, 50, 100.0),
    ]
    return [load for load in found if not args.only or any(word in load.name for word in args.only)]


# --- processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def cpu_s(pid: int) -> float:
    """Of all threads."""
    return sum(int(path.read_text().split()[0]) for path in Path(f"/proc/{pid}/task").glob("*/schedstat")) / 1e9


def rss_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024


@contextmanager
def running(command: list[str], port: int, timeout_s: float = 15.0, **env: str) -> Iterator[int]:
    """Start a server, wait until it listens, stop it in the end. Yields its pid."""
    process = subprocess.Popen(command, cwd=HERE.parent, env=os.environ | env, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + timeout_s
        while not listens(port):
            if process.poll() is not None or time.monotonic() > deadline:  # its stderr says why
                raise SystemExit(f"{command[0]} did not start to listen on port {port}")
            time.sleep(0.05)
        yield process.pid
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def proxies(engine: int, folder: Path, litellm: str | None) -> Iterator[list[Target]]:
    targets = [Target("direct", engine)]
    with ExitStack() as stack:
        port = free_port()
        command = [sys.executable, str(HERE / "bench_proxy.py"), str(port), f"http://127.0.0.1:{engine}"]
        targets.append(Target("nimhost", port, GATEWAY_PATH, pid=stack.enter_context(running(command, port))))
        if nginx := shutil.which("nginx") or shutil.which("/usr/sbin/nginx"):
            port, config = free_port(), folder / "nginx.conf"
            config.write_text(NGINX.format(dir=folder, engine=engine, port=port))
            command = [nginx, "-e", str(folder / "error.log"), "-c", str(config)]
            targets.append(Target("nginx", port, pid=stack.enter_context(running(command, port))))
        else:
            print("nginx is not installed: no comparison with it (apt-get install nginx-light)", file=sys.stderr)
        if program := shutil.which(litellm or "litellm"):
            targets.append(stack.enter_context(litellm_running(program, engine, folder)))
        else:
            print(f"{litellm or 'litellm'} is not there: no comparison with it. {HOW_TO_LITELLM}", file=sys.stderr)
        yield targets


@contextmanager
def litellm_running(program: str, engine: int, folder: Path) -> Iterator[Target]:
    port, config, key = free_port(), folder / "litellm.yaml", f"sk-{secrets.token_hex(16)}"  # it wants one
    config.write_text(LITELLM.format(engine=engine))
    command = [program, "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    with running(command, port, 120.0, LITELLM_MASTER_KEY=key, LITELLM_LOCAL_MODEL_COST_MAP="True") as pid:
        headers = {"authorization": f"Bearer {key}"}
        yield Target("litellm", port, exact=False, pid=pid, share=0.02, most_connections=128, headers=headers)


# --- measuring


@dataclass
class Round:
    cpu_us: float
    """For one request or chunk."""
    per_s: float
    p50_ms: float
    p99_ms: float
    first_ms: float
    wrong: int


def measure(target: Target, load: Load) -> Round:
    requests = max(int(load.requests * target.share), load.connections)
    order = {
        "port": target.port, "path": target.path, "model": "default/bench", "connections": load.connections,
        "requests": requests, "chunks": load.chunks, "pause_ms": load.pause_ms, "prompt_bytes": load.prompt_bytes,
        "exact": target.exact, "headers": target.headers,
    }  # fmt: skip
    before_s = cpu_s(target.pid) if target.pid else 0.0
    command = [sys.executable, str(HERE / "bench_load.py"), json.dumps(order)]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    spent_s = cpu_s(target.pid) - before_s if target.pid else 0.0
    units = requests * (load.chunks + 1 if load.chunks else 1)
    return Round(
        cpu_us=spent_s / units * 1e6,
        per_s=units / report["wall_s"],
        p50_ms=(report["p50_s"] or 0) * 1e3,
        p99_ms=(report["p99_s"] or 0) * 1e3,
        first_ms=(report["first_p50_s"] or 0) * 1e3,
        wrong=report["not_200"] + report["missing"] + report["altered"] + report["lost_events"],
    )


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    engine, chosen = free_port(), loads(args)
    with running([sys.executable, str(HERE / "bench_upstream.py"), str(engine)], engine), \
            proxies(engine, folder, args.litellm) as targets:  # fmt: skip
        pairs = [(load, target) for load in chosen for target in targets if load.connections <= target.most_connections]
        for load, target in pairs:  # warm
            few = Load(load.name, load.connections, max(load.requests // 10, 1), load.chunks and 5)
            measure(target, few)
        rss_before = {target.name: rss_mb(target.pid) for target in targets if target.pid}
        rounds: dict[tuple[str, str], list[Round]] = {(load.name, target.name): [] for load, target in pairs}
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
            for load, target in pairs:
                rounds[load.name, target.name].append(measure(target, load))
        rss_after = {target.name: rss_mb(target.pid) for target in targets if target.pid}
    rows = [row(load, target.name, rounds) for load, target in pairs]
    void = [f"{name}, {load}" for (load, name), found in rounds.items() if any(one.wrong for one in found)]
    report = {"rounds": args.rounds, "rows": rows, "void": void, "rss_before_mb": rss_before, "rss_after_mb": rss_after}
    return report | {"verdicts": verdicts(report)}


def row(load: Load, name: str, rounds: dict[tuple[str, str], list[Round]]) -> dict[str, Any]:
    def median(target: str, what: str) -> float | None:
        found = rounds.get((load.name, target))
        return statistics.median(getattr(one, what) for one in found) if found else None

    added = {
        f"added_{what}": median(name, what) - median("direct", what)  # type: ignore[operator]
        for what in ("p50_ms", "p99_ms", "first_ms")
    }
    nginx_us, cpu_us = median("nginx", "cpu_us"), median(name, "cpu_us")
    return {
        "load": load.name, "target": name, "unit": load.unit, "cpu_us": cpu_us, "per_s": median(name, "per_s"), **added,
        "times_nginx": cpu_us / nginx_us if nginx_us and cpu_us else None,
        "wrong": sum(one.wrong for one in rounds[load.name, name]),
        "rounds": [asdict(one) for one in rounds[load.name, name]],
    }  # fmt: skip


def verdicts(report: dict[str, Any]) -> list[tuple[str, float, str, bool]]:
    """What was promised -> what was measured: name, number, limit, kept."""
    rows = {(r["load"], r["target"]): r for r in report["rows"]}
    found: list[tuple[str, float, str, bool]] = []

    def promise(name: str, number: float | None, limit: float) -> None:
        if number is not None:
            found.append((name, number, f"<= {limit:g}", number <= limit))

    def value(load: str, what: str, target: str = "nimhost") -> Any:
        return rows.get((load, target), {}).get(what)

    promise("CPU per request, times nginx's, 32 connections", value("32 connections", "times_nginx"), 5)
    promise("CPU per chunk, times nginx's, 128 streams", value("128 streams x 100", "times_nginx"), 2)
    promise("added p50 at one connection, ms", value("1 connection", "added_p50_ms"), 0.5)
    small, large = value("32 connections", "cpu_us"), value("32 connections, 100 KB", "cpu_us")
    promise("CPU of a 100 KB body, times a 100-byte one's", large / small if small and large else None, 3)
    promise("RSS after everything, MB", report["rss_after_mb"].get("nimhost"), 150)
    litellm = value("32 connections", "cpu_us", "litellm")
    promise("CPU per request, times LiteLLM's", small / litellm if small and litellm else None, 1 / 60)
    return found


def print_table(report: dict[str, Any]) -> None:
    head = ("load", "target", "CPU us", "per", "x nginx", "per s", "+p50 ms", "+p99 ms", "+first ms", "wrong")
    lines = [head]
    for r in report["rows"]:
        proxy = r["target"] != "direct"
        lines.append((
            r["load"], r["target"], f"{r['cpu_us']:.1f}" if proxy else "", r["unit"] if proxy else "",
            f"{r['times_nginx']:.2f}" if proxy and r["times_nginx"] else "", f"{r['per_s']:.0f}",
            *(f"{r[key]:.2f}" if proxy else "" for key in ("added_p50_ms", "added_p99_ms", "added_first_ms")),
            str(r["wrong"]),
        ))  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    for name, before in report["rss_before_mb"].items():
        print(f"RSS of {name}: {before:.0f} MB warm, {report['rss_after_mb'][name]:.0f} MB after")
    for name, number, limit, kept in report["verdicts"]:
        print(f"{'ok    ' if kept else 'MISSED'} {name}: {number:.3g} ({limit})")
    if report["void"]:
        print(f"VOID: wrong, missing or altered replies in {'; '.join(report['void'])}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="scripts/bench gateway")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=10_000, help="requests a round at 32 connections")
    parser.add_argument("--only", nargs="*", help="loads whose name has one of these words")
    parser.add_argument("--litellm", metavar="PROGRAM", default=os.environ.get("LITELLM"), help="where LiteLLM's is")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run(args, Path(folder))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print_table(report)
    return 1 if report["void"] else 0


if __name__ == "__main__":
    sys.exit(main())
