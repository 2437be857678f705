"""A World whose engines take adapters, as vLLM and NIM do, and the files of adapters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx

from tests.fakes.containers import FakeContainer, fake_image
from tests.fakes.engine import FakeEngine, Received, Reply
from tests.support import eventually
from tests.tiny import tiny_lora, tiny_model
from tests.world import MODELS, World

FILESETS = "/apis/files/v2/workspaces/default/filesets"
GATEWAY = "/apis/inference-gateway/v2/workspaces/default"
ADAPTERS = f"{MODELS}/adapters"
VLLM, NIM = "vllm-cpu:1", "my/llm-nim:1"
Json = dict[str, Any]


class LoraWorld(World):
    """With a model `base` (two layers, hidden size 128) and filesets `lora` and `other-lora` with adapters for it."""

    peft_refresh_s = 0.2

    async def start(self) -> None:
        for image in (VLLM, NIM):
            self.docker.images[image] = fake_image(image)
        await super().start()

    async def _start_engine(self, container: FakeContainer) -> int:
        def crash(code: int) -> None:
            self.docker.exit(container.id, code)

        spec, args = container.spec, list(container.spec.args)
        served = args[args.index("--served-model-name") + 1] if "--served-model-name" in args else ""
        rank = args[args.index("--max-lora-rank") + 1] if "--max-lora-rank" in args else "16"
        engine = FakeEngine(
            served=(served or spec.env.get("NIM_SERVED_MODEL_NAME", "fake"),), tag=container.id, faults=self.faults,
            lora="--enable-lora" in args, check_lora_paths=True, max_lora_rank=int(rank),
            peft_source=spec.env.get("NIM_PEFT_SOURCE"), peft_refresh_s=self.peft_refresh_s,
            mounts={mount.target: mount.source for mount in spec.mounts}, exit=crash,
        )  # fmt: skip
        await engine.start()
        self.engines[container.id] = engine
        return engine.port

    async def prepare(self) -> None:
        """The model and the adapters' files."""
        model = tiny_model(self.directory / "base")
        await self.fileset("base", model)
        await self.post(f"{MODELS}/models", {"name": "base", "fileset": "base"})
        for seed, name in enumerate(("lora", "other-lora"), 1):
            await self.fileset(name, tiny_lora(self.directory / name, base="some/where", seed=seed))

    async def fileset(self, name: str, directory: Path) -> None:
        reply = await self.http.post(
            FILESETS, json={"name": name, "storage": {"type": "local", "path": str(directory)}}
        )
        assert reply.status_code == 200, reply.text

    async def serve(self, name: str = "dd", *, engine: str = "vllm", lora: bool = True, **executor: Any) -> None:
        """A deployment of `base`, READY."""
        image, tag = (VLLM if engine == "vllm" else NIM).split(":")
        config = {
            "name": name, "engine": engine, "model_spec": {"model_name": "base", "lora_enabled": lora},
            "executor_config": {"gpu": 0, "image_name": image, "image_tag": tag, **executor},
        }  # fmt: skip
        await self.post(f"{MODELS}/deployment-configs", config)
        await self.post(f"{MODELS}/deployments", {"name": name, "config": name})
        await self.wait(name, "READY")

    async def register(self, name: str = "math", fileset: str = "lora", **more: Any) -> Json:
        body = {"name": name, "model": "default/base", "fileset": fileset, "finetuning_type": "lora", **more}
        return await self.post(ADAPTERS, body)

    async def change(self, name: str = "math", **fields: Any) -> Json:
        reply = await self.http.patch(f"{ADAPTERS}/{name}", json=fields)
        assert reply.status_code == 200, reply.text
        found: Json = reply.json()
        return found

    async def adapter(self, name: str = "math") -> Json:
        found: Json = (await self.http.get(f"{ADAPTERS}/{name}")).json()
        return found

    async def loaded(self, name: str = "math", on: tuple[str, ...] = ("default/dd",), timeout_s: float = 5) -> Json:
        """The adapter, once it is loaded on these deployments."""

        async def there() -> Json | None:
            found = await self.adapter(name)
            assert sorted(found["loaded_on"]) == sorted(on), found
            return found

        found = await eventually(there, timeout_s)
        assert found is not None
        return found

    async def chat(self, model: str, route: str = "/v1", provider: str | None = None) -> httpx.Response:
        if provider is not None:
            route = f"{GATEWAY}/provider/{provider}/-/v1"
        body = {"model": model, "messages": [{"role": "user", "content": "Hello!"}]}
        return await self.http.post(f"{route}/chat/completions", json=body)

    def engine(self) -> FakeEngine:
        """The only one that runs."""
        (engine,) = self.engines.values()
        return engine

    def copies(self) -> set[str]:
        """Directories of adapters that vLLMs see; what is being written or removed has a hidden name."""
        home = self.directory / "loras" / "default--base"
        return {path.name for path in home.glob("[!.]*")}


def count_looks(engine: FakeEngine) -> list[None]:
    """Grows each time somebody asks the engine what it serves."""
    looks: list[None] = []
    models = engine.models

    def watched(request: Received) -> Reply:
        looks.append(None)
        return models(request)

    engine.scripted["/v1/models"] = watched
    return looks


def said(reply: httpx.Response) -> str:
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def config_of(directory: Path) -> Json:
    found: Json = json.loads((directory / "adapter_config.json").read_bytes())
    return found


def change_config(directory: Path, **fields: Any) -> Path:
    """None takes a field away."""
    config = {key: value for key, value in (config_of(directory) | fields).items() if value is not None}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory
