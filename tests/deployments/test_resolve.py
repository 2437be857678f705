"""From an order to a container: what is read of weights, adapters and plugins, and the files that are written."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from nimhost.config import Models, ToolCallPlugin
from nimhost.deployments.observed import Located
from nimhost.deployments.resolve import Resolver
from nimhost.engines.order import ChatOrder
from nimhost.entities import Adapter, Fileset, LocalStorage, Lora, ToolCallConfig
from nimhost.errors import BadRequest
from tests.engines.make import model, order
from tests.fakes.containers import FakeContainer, fake_image
from tests.spec_deployments import VLLM
from tests.support import eventually
from tests.tiny import RANK, tiny_lora, tiny_model
from tests.world import MODELS, World

FILESETS = "/apis/files/v2/workspaces/default/filesets"
PLUGINS = Models(tool_call_plugin=ToolCallPlugin(enabled=True))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    async with World(tmp_path, gpus=3, models=PLUGINS) as world:
        world.docker.images[VLLM] = fake_image(VLLM)
        yield world


def resolver(world: World) -> Resolver:
    return world.daemon.resolver


async def insert(world: World, kind: str, name: str, wish: Any) -> None:
    async with world.daemon.store.transaction() as tx:
        await tx.insert(kind, "default", name, wish)


async def test_a_spec_that_is_not_known_yet_is_read_from_the_weights(world: World, tiny: Path) -> None:
    """A deployment made right after its model is split as the model allows, whatever became of its spec by then."""
    made = await resolver(world).resolve(order("vllm", gpu=3, with_model=model()), Located(source=str(tiny)))
    assert "--tensor-parallel-size" not in made.args
    assert "2 of 3 GPUs stay idle" in made.warnings[0]
    two = await resolver(world).resolve(order("vllm", gpu=2, with_model=model()), Located(source=str(tiny)))
    assert two.args[-2:] == ("--tensor-parallel-size", "2")


async def test_weights_that_say_nothing_are_left_to_the_engine(world: World, tmp_path: Path) -> None:
    made = await resolver(world).resolve(order("vllm", gpu=3, with_model=model()), Located(source=str(tmp_path)))
    assert made.args[-2:] == ("--tensor-parallel-size", "3")


async def test_the_rank_is_that_of_the_adapters_registered_by_then(world: World, tiny: Path, tmp_path: Path) -> None:
    lora = tiny_lora(tmp_path / "lora")
    await insert(world, "filesets", "lora", Fileset(storage=LocalStorage(path=str(lora))))
    base = {"model": "default/qwen3-1-7b", "fileset": "default/lora"}
    changes: dict[str, dict[str, Any]] = {
        "told": {"finetuning_type": "lora", "lora_config": Lora(rank=48)},
        "read": {"finetuning_type": "lora"},
        "off": {"finetuning_type": "lora", "lora_config": Lora(rank=512), "enabled": False},
        "other": {"finetuning_type": "p_tuning"},
        "gone": {"finetuning_type": "lora", "fileset": "default/nowhere"},
    }
    for name, more in changes.items():
        await insert(world, "adapters", name, Adapter(**(base | more)))
    asked = order("vllm", with_model=model(), wish={"lora_enabled": True})
    known = await resolver(world)._known(model(), Located(source=str(tiny)), True)
    assert sorted(known.lora_ranks) == [RANK, 48]
    made = await resolver(world).resolve(asked, Located(source=str(tiny)))
    assert made.args[made.args.index("--max-lora-rank") + 1] == "64"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, r"exactly one \.py file, this one has 0"),
        ({"a.py": b"", "b.py": b""}, r"this one has 2 \(a\.py, b\.py\)"),
        ({"readme.md": b""}, "this one has 0"),
        ({"a.py": b"\xff\xfe"}, "not UTF-8"),
        ({"a.py": b"#" * (1 << 20) + b"#"}, "larger than"),
        (None, "Fileset 'default/pp' not found"),
    ],
)
async def test_a_plugin_is_one_python_file(world: World, files: dict[str, bytes] | None, says: str) -> None:
    if files is not None:
        await world.http.post(FILESETS, json={"name": "pp"})
    for name, content in (files or {}).items():
        await world.http.put(f"{FILESETS}/pp/-/{name}", content=content)
    chat = ChatOrder(tools=ToolCallConfig(tool_call_parser="p", tool_call_plugin="default/pp"))
    with pytest.raises(BadRequest, match=says):
        await resolver(world).check(order("nim", with_model=model(chat=chat)))


# --- through the whole daemon --------------------------------------------------------------------------------------


async def deploy(world: World, tiny: Path, gpu: int = 1, **spec: Any) -> Any:
    await world.http.post(FILESETS, json={"name": "ff", "storage": {"type": "local", "path": str(tiny)}})
    await world.http.post(f"{MODELS}/models", json={"name": "mm", "fileset": "default/ff"})
    body = {"engine": "vllm", "model_spec": {"model_name": "mm", **spec}, "executor_config": {"gpu": gpu}}
    await world.http.post(f"{MODELS}/deployment-configs", json={"name": "cc", **body})
    return await world.http.post(f"{MODELS}/deployments", json={"name": "dd", "config": "cc"})


async def container(world: World) -> FakeContainer:
    return (await eventually(lambda: list(world.docker.containers.values())))[0]


async def test_a_chat_template_is_a_file_that_only_nimhost_writes(world: World, tiny: Path) -> None:
    template = "{% for m in messages %}\n{{ m.content }} – ü{% endfor %}"
    assert (await deploy(world, tiny, chat_template=template)).status_code == 201
    made = (await container(world)).spec
    (mount,) = [m for m in made.mounts if m.target == "/nimhost/chat-template.jinja"]
    written = Path(mount.source)
    assert mount.read_only
    assert written.read_bytes() == template.encode()
    assert written.stat().st_mode & 0o777 == 0o644
    assert written.is_relative_to(world.directory / "container-files")
    assert [path.name for path in written.parent.iterdir()] == ["chat-template.jinja"]
    assert made.args[made.args.index("--chat-template") + 1] == mount.target
    assert template not in made.args


async def test_the_directory_of_adapters_is_there_before_the_engine(world: World, tiny: Path) -> None:
    assert (await deploy(world, tiny, lora_enabled=True)).status_code == 201
    (mount,) = [m for m in (await container(world)).spec.mounts if m.target == "/loras"]
    assert mount.source == str(world.directory / "loras" / "default--mm")
    assert (mount.read_only, Path(mount.source).stat().st_mode & 0o777) == (True, 0o755)


async def test_idle_gpus_are_said_on_the_deployment(world: World, tiny: Path) -> None:
    assert (await deploy(world, tiny, gpu=3)).status_code == 201
    await container(world)

    async def warned() -> bool:
        return "2 of 3 GPUs stay idle" in ((await world.deployment("dd")) or {}).get("warnings", [""])[0]

    await eventually(warned)


@pytest.mark.parametrize(
    ("spec", "field"),
    [
        (
            {"tool_call_config": {"tool_call_parser": "p", "tool_call_plugin": "default/pp"}},
            "tool_call_config.tool_call_plugin",
        ),
        ({"tool_call_config": {"auto_tool_choice": True}}, "model_spec.tool_call_config.tool_call_parser"),
    ],
)
async def test_what_cannot_start_is_refused_and_nothing_is_stored(
    world: World, tiny: Path, spec: dict[str, Any], field: str
) -> None:
    await world.http.post(FILESETS, json={"name": "pp"})
    for name in ("a.py", "b.py"):
        await world.http.put(f"{FILESETS}/pp/-/{name}", content=b"")
    refused = await deploy(world, tiny, **spec)
    assert refused.status_code == 400, refused.text
    assert field in refused.json()["detail"]
    assert await world.deployment("dd") is None
    assert world.docker.containers == {}
