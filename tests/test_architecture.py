"""The import rules of the design: downward only, decisions without effects, one importer per outside library."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "nimhost"
PURE = [
    "errors", "refs", "runs", "sizes", "layers", "tokens", "entities", "kinds", "filters", "auth_header", "engines",
    "models", "deployments.actions", "deployments.adapters", "deployments.alone", "deployments.desired",
    "deployments.driver", "deployments.explain", "deployments.fit", "deployments.labels", "deployments.model_list",
    "deployments.need", "deployments.observed", "deployments.oom", "deployments.placement", "deployments.plan",
    "deployments.preflight", "deployments.retry", "deployments.roll", "deployments.room", "deployments.shelf",
    "deployments.situation", "deployments.storage",
    "gateway.routes", "gateway.paths", "gateway.headers", "gateway.bodies", "gateway.replies",
    "gateway.metrics", "gateway.relabel", "gateway.translate", "gateway.usage", "api.decode", "api.show",
    "api.schemas", "api.openapi_kinds", "api.openapi_others", "api.access", "api.own_address",
]  # fmt: skip
"""No I/O, no clock, no asyncio, no logging."""
EFFECTS = [
    "asyncio", "concurrent", "fcntl", "http", "io", "logging", "multiprocessing", "os", "pathlib", "random", "secrets",
    "select", "shutil", "signal", "socket", "sqlite3", "subprocess", "sys", "tempfile", "threading", "time", "uuid",
    "urllib.request", "aiosqlite", "click", "cryptography", "docker", "httpx", "huggingface_hub", "pynvml",
    "requests", "rich", "starlette",
]  # fmt: skip
LAYERS = (
    ["errors"],
    ["refs", "runs", "sizes", "layers", "tokens"],
    ["entities"],
    ["kinds"],
    ["config", "engines", "models", "filters", "auth_header"],
    [name for name in PURE if name.startswith("deployments.")] + ["gateway.routes", "gateway.paths"],
    ["store", "host", "gateway"],
    ["deployments"],
    ["nim", "api"],
    ["loopwatch", "streams", "view", "listening", "startup", "daemon"],
)
BESIDE = {
    "client": ["errors", "refs", "runs", "entities", "kinds"],
    "cli": ["client", "errors", "refs", "kinds", "tokens"],
    "__main__": ["cli"],
}
"""They look at nothing else. `cli.serve`, and `cli.tokens` for the first token, are the doors to the daemon."""
IMPORTERS = {
    "aiosqlite": ["store"], "click": ["cli"], "cryptography": ["host.vault"], "docker": ["host.containers"],
    "httptools": ["gateway.connection", "gateway.front"],
    "httpx": ["client", "deployments.adapter_calls", "deployments.discovery", "deployments.probe", "host.registry"],
    "huggingface_hub": ["host.weights.xet"], "jinja2": ["auth_header", "models.chat_template"],
    "prometheus_client": ["api.metrics"], "pynvml": ["host.gpus"], "rich": ["cli"],
    "starlette": ["api"], "uvicorn": ["listening"], "uvloop": ["daemon"], "yaml": ["cli.structures"],
}  # fmt: skip


def modules() -> dict[str, set[str]]:
    """Module (without `nimhost.`) -> everything it imports anywhere, `from x import y` as x and x.y."""
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        imports: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imports |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{name} imports relatively"
                imports |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
        found[name] = imports
    return found


MODULES = modules()
NAMES = sorted(name for name in MODULES if name != "__init__")


def within(name: str, places: list[str]) -> bool:
    return any(name == place or name.startswith(f"{place}.") for place in places)


def own(name: str) -> list[str]:
    """The modules of ours that one imports, `nimhost` itself (the version, the public names) aside."""
    return [found for i in MODULES[name] if (found := i.removeprefix("nimhost.")) != i and found in MODULES]


def layer(name: str) -> int:
    return next((number for number, places in enumerate(LAYERS) if within(name, places)), -1)


@pytest.mark.parametrize("name", NAMES)
def test_imports_go_downward(name: str) -> None:
    package = name.partition(".")[0]
    if package in BESIDE:
        allowed = [package, *BESIDE[package], *(["daemon"] if name in ("cli.serve", "cli.tokens") else [])]
        assert [i for i in own(name) if not within(i, allowed)] == []
        return
    assert layer(name) >= 0, f"say in LAYERS where {name} belongs"
    upward = [i for i in own(name) if layer(i) < 0 or layer(i) > layer(name)]
    sideways = [i for i in own(name) if layer(i) == layer(name) and i.partition(".")[0] != package]
    ordered = within(name, ["entities", "refs", "view", "listening", "startup", "daemon", "filters", "auth_header"])
    assert upward == []
    assert ordered or sideways == []


@pytest.mark.parametrize("name", [name for name in NAMES if within(name, PURE)])
def test_what_decides_has_no_effects(name: str) -> None:
    assert {i for i in MODULES[name] if within(i, EFFECTS)} == set()


@pytest.mark.parametrize("library", IMPORTERS)
def test_an_outside_library_has_one_importer(library: str) -> None:
    importers = [name for name, imports in MODULES.items() if any(within(i, [library]) for i in imports)]
    assert [name for name in importers if not within(name, IMPORTERS[library])] == []


def test_every_outside_library_is_in_the_table() -> None:
    declared = (ROOT.parent / "pyproject.toml").read_text().partition("dependencies = [")[2].partition("]")[0]
    names = {line.strip(' ",').partition(">")[0].replace("-", "_") for line in declared.splitlines() if line.strip()}
    free = {"msgspec", "nvidia_ml_py", "pyyaml"}
    assert names - free - set(IMPORTERS) == set()


def test_modules_are_short_enough_to_read() -> None:
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")}
    assert {name: n for name, n in lengths.items() if n > 400} == {}


SURVIVE_ANYTHING = {
    "api.http": 1, "gateway.cycle": 1, "gateway.proxy": 1, "deployments.reconciler": 2, "deployments.loading": 1,
    "deployments.pulls": 1, "deployments.specs": 1,
}  # fmt: skip
"""Where any exception at all is caught, and in how many places: the last border of a request, a loop or an action. Each
says in a comment why it has to go on."""


def test_only_the_last_borders_catch_whatever_comes() -> None:
    found: dict[str, int] = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        handlers = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ExceptHandler)]
        if broad := sum(isinstance(h.type, ast.Name) and h.type.id == "Exception" for h in handlers):
            found[name] = broad
    assert {name: number for name, number in found.items() if number > SURVIVE_ANYTHING.get(name, 0)} == {}
