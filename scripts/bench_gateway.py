"""What the gateway costs, beside doing without one, nginx and LiteLLM (where installed), in one run on one machine.

Rounds are interleaved (each target in each round) and medians are shown. CPU time is the proxy process's own, from
/proc/PID/stat, so that a busy machine blurs it little. A reply that is not 200, is missing, or differs from the
engine's by one byte makes the run void (exit 1).
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
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
TICK_S = 1 / os.sysconf("SC_CLK_TCK")
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
    model: str = "default/bench"
    exact: bool = True
    pid: int | None = None
    """None: no proxy, nothing to measure."""
    share: float = 1.0
    """Of the requests, for what is too slow for all of them."""
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Load:
    """`unit` is what CPU time is divided by: a request or a chunk."""

    name: str
    connections: int
    requests: int
    chunks: int = 0
    prompt_repeats: int = 10

    @property
    def unit(self) -> str:
        return "chunk" if self.chunks else "request"


@dataclass
class Result:
    cpu_us: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    first_ms: list[float] = field(default_factory=list)
    wrong: int = 0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * TICK_S


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


def measure(target: Target, load: Load, result: Result) -> None:
    requests = max(int(load.requests * target.share), load.connections)
    order = {
        "port": target.port, "path": target.path, "model": target.model, "connections": load.connections,
        "requests": requests, "chunks": load.chunks, "prompt_repeats": load.prompt_repeats, "exact": target.exact,
        "headers": target.headers,
    }  # fmt: skip
    before_s = cpu_s(target.pid) if target.pid else 0.0
    command = [sys.executable, str(HERE / "bench_load.py"), json.dumps(order)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    spent_s = cpu_s(target.pid) - before_s if target.pid else 0.0
    report = json.loads(run.stdout)
    units = requests * (load.chunks + 1 if load.chunks else 1)
    result.cpu_us.append(spent_s / units * 1e6)
    result.rate.append(units / report["wall_s"])
    result.p50_ms.append((report["p50_s"] or 0) * 1e3)
    result.p99_ms.append((report["p99_s"] or 0) * 1e3)
    result.first_ms.append((report["first_p50_s"] or 0) * 1e3)
    result.wrong += report["not_200"] + report["missing"] + report["altered"] + report["lost_events"]


def loads(args: argparse.Namespace) -> list[Load]:
    repeats = 100_000 // len("Tell me a story. ")
    return [
        Load("1 connection", 1, args.requests // 4),
        Load("32 connections", 32, args.requests),
        Load("32 connections, 100 KB prompts", 32, args.requests // 10, prompt_repeats=repeats),
        Load(f"{args.streams} streams x {args.chunks} chunks", args.streams, args.streams, chunks=args.chunks),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, prog="scripts/bench gateway")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=10_000, help="requests a round at 32 connections")
    parser.add_argument("--streams", type=int, default=128)
    parser.add_argument("--chunks", type=int, default=100)
    parser.add_argument("--pause-ms", type=float, default=20.0, help="pause of the engine between two chunks")
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = run(args, Path(folder))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    print_table(report)
    return 1 if report["void"] else 0


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    engine, chosen = free_port(), loads(args)
    upstream = [
        sys.executable,
        str(HERE / "bench_upstream.py"),
        str(engine),
        str(args.chunks),
        str(args.pause_ms / 1000),
    ]
    with running(upstream, engine), proxies(engine, folder) as targets:
        for target in targets:  # warm
            for load in chosen:
                measure(target, Load(load.name, load.connections, load.requests // 10, load.chunks), Result())
        rss_before = {target.name: rss_mb(target.pid) for target in targets if target.pid}
        results = {(target.name, load.name): Result() for target in targets for load in chosen}
        for number in range(args.rounds):
            print(f"round {number + 1} of {args.rounds}", file=sys.stderr)
            for load in chosen:
                for target in targets:
                    measure(target, load, results[target.name, load.name])
        rss_after = {target.name: rss_mb(target.pid) for target in targets if target.pid}
    rows = [row(target.name, load, results, rss_before, rss_after) for load in chosen for target in targets]
    void = [f"{name}, {load}" for (name, load), result in results.items() if result.wrong]
    return {"rounds": args.rounds, "pause_ms": args.pause_ms, "rows": rows, "void": void}


@contextmanager
def proxies(engine: int, folder: Path) -> Iterator[list[Target]]:
    targets = [Target("direct", engine)]
    own, nginx, other = free_port(), free_port(), free_port()
    with running([sys.executable, str(HERE / "bench_proxy.py"), str(own), f"http://127.0.0.1:{engine}"], own) as pid:
        targets.append(Target("nimhost", own, GATEWAY_PATH, pid=pid))
        with nginx_running(engine, nginx, folder) as nginx_pid:
            if nginx_pid:
                targets.append(Target("nginx", nginx, pid=nginx_pid))
            key = f"sk-{secrets.token_hex(16)}"  # it does not start without one
            with litellm_running(engine, other, folder, key) as litellm_pid:
                if litellm_pid:
                    headers = {"authorization": f"Bearer {key}"}
                    targets.append(Target("litellm", other, exact=False, pid=litellm_pid, share=0.02, headers=headers))
                yield targets


@contextmanager
def nginx_running(engine: int, port: int, folder: Path) -> Iterator[int | None]:
    program = shutil.which("nginx") or shutil.which("/usr/sbin/nginx")
    if not program:
        print("nginx is not installed: no comparison with it (apt-get install nginx-light)", file=sys.stderr)
        yield None
        return
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(dir=folder, engine=engine, port=port))
    with running([program, "-e", str(folder / "error.log"), "-c", str(config)], port) as pid:
        yield pid


@contextmanager
def litellm_running(engine: int, port: int, folder: Path, key: str) -> Iterator[int | None]:
    program = shutil.which("litellm")
    if not program:
        print("litellm is not on the PATH: no comparison with it", file=sys.stderr)
        yield None
        return
    config = folder / "litellm.yaml"
    config.write_text(LITELLM.format(engine=engine))
    command = [program, "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    with running(command, port, 120.0, LITELLM_MASTER_KEY=key) as pid:
        yield pid


def row(
    name: str, load: Load, results: dict[tuple[str, str], Result], before: dict[str, float], after: dict[str, float]
) -> dict[str, Any]:
    result, direct = results[name, load.name], results["direct", load.name]
    nginx = results.get(("nginx", load.name))
    cpu_us = statistics.median(result.cpu_us)
    nginx_us = statistics.median(nginx.cpu_us) if nginx else 0.0
    return {
        "load": load.name, "target": name, "unit": load.unit, "cpu_us": cpu_us, "cpu_us_rounds": result.cpu_us,
        "times_nginx": cpu_us / nginx_us if nginx_us else None,
        "per_s": statistics.median(result.rate),
        "added_p50_ms": statistics.median(result.p50_ms) - statistics.median(direct.p50_ms),
        "added_p99_ms": statistics.median(result.p99_ms) - statistics.median(direct.p99_ms),
        "added_first_ms": statistics.median(result.first_ms) - statistics.median(direct.first_ms),
        "wrong": result.wrong, "rss_before_mb": before.get(name), "rss_after_mb": after.get(name),
    }  # fmt: skip


def print_table(report: dict[str, Any]) -> None:
    head = ("load", "target", "CPU us", "per", "x nginx", "per s", "+p50 ms", "+p99 ms", "+first ms", "wrong", "RSS MB")
    lines = [head]
    for r in report["rows"]:
        measured = r["target"] != "direct"
        lines.append((
            r["load"], r["target"], f"{r['cpu_us']:.1f}" if measured else "", r["unit"] if measured else "",
            f"{r['times_nginx']:.2f}" if measured and r["times_nginx"] else "", f"{r['per_s']:.0f}",
            *(f"{r[key]:.2f}" if measured else "" for key in ("added_p50_ms", "added_p99_ms", "added_first_ms")),
            str(r["wrong"]), f"{r['rss_before_mb']:.0f}-{r['rss_after_mb']:.0f}" if measured else "",
        ))  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    if report["void"]:
        print(f"VOID: wrong, missing or altered replies in {'; '.join(report['void'])}")


if __name__ == "__main__":
    sys.exit(main())
