"""What the two pages of the reference platform need to be true: images, repositories, providers, keys, GPUs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import docker

from nimhost.config import Engines
from tests import images
from tests.e2e.daemon import DaemonProcess
from tests.e2e.pages import commands
from tests.e2e.upstreams import ANTHROPIC_KEY, NVIDIA_KEY, OPENAI_KEY, Upstreams
from tests.fakes.hub import FakeHub

IMAGES = (
    "nvcr.io/nim/meta/llama-3.2-1b-instruct:1.8.6",
    "nvcr.io/nim/nvidia/nemoguard-jailbreak-detect:1.10.1",
    Engines().nim.image,
    Engines().vllm.image,
)
GPUS = 10
HF_TOKEN = "hf_standin"
QWEN = {
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "num_hidden_layers": 2, "hidden_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 448,
    "tie_word_embeddings": True, "torch_dtype": "bfloat16", "max_position_embeddings": 4096, "hidden_act": "silu",
}  # fmt: skip
TENSORS = {"model.embed_tokens.weight": {"dtype": "BF16", "shape": [448, 64], "data_offsets": [0, 57344]}}
PLACEHOLDERS = {
    "<deployment-name>": "qwen3-lora-deployment",
    "<config-name>": "qwen3-lora-config",
    "<provider-name>": "anthropic",
    "<secret-name>": "anthropic-api-key",
}


ABOVE = ("already exists", "the page says: skip if already created above")
EXPECTED = {
    'Deploy with LoRA Adapters: nemo files filesets create "qwen3-1-7b"': ABOVE,
    'Deploy with LoRA Adapters: nemo models create "qwen3-1-7b"': ABOVE,
}
"""Steps of the bash blocks that fail, and why: see `judge`."""


class World(NamedTuple):
    """A daemon in the middle of it all, and a directory to run commands in."""

    daemon: DaemonProcess
    hub: FakeHub
    upstreams: Upstreams
    directory: Path

    def here(self, text: str) -> str:
        """`text` with what cannot be the same here: three addresses of the outside world, and placeholders."""
        for written, meant in {**self.upstreams.addresses, **PLACEHOLDERS}.items():
            text = text.replace(written, meant)
        return text

    def command(self, name: str, script: str) -> None:
        """A command that `env` finds before all others."""
        path = self.directory / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def env(self) -> dict[str, str]:
        """What the pages expect of the user's environment, beside NMP_BASE_URL."""
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("NIMHOST_", "NMP_", "XDG_"))}
        return inherited | {
            "PATH": f"{self.directory}/bin:{os.environ['PATH']}",
            "HOME": str(self.directory), "NVIDIA_API_KEY": NVIDIA_KEY, "OPENAI_API_KEY": OPENAI_KEY,
            "ANTHROPIC_API_KEY": ANTHROPIC_KEY, "HF_TOKEN": HF_TOKEN, "NO_COLOR": "1", "COLUMNS": "200",
            "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost",
        }  # fmt: skip


@contextmanager
def spec_world(directory: Path, engine: docker.DockerClient, label: str) -> Iterator[World]:
    """`label` keeps the GPUs of two worlds on one engine apart."""
    gpus = ", ".join(
        f'{{ name = "SIM-80G", memory_gib = 80, uuid = "GPU-{label}-{os.getpid()}-{i}" }}' for i in range(GPUS)
    )
    with ExitStack() as stack:
        images.tag_fake_engine(*IMAGES, client=engine)
        hub, upstreams = stack.enter_context(FakeHub()), stack.enter_context(Upstreams())
        fill(hub)
        env = {"NIMHOST_WEIGHTS__ENDPOINT": hub.url, "NIMHOST_GPUS__SIMULATED": f"[{gpus}]", "NGC_API_KEY": "nvapi-ngc"}
        daemon = DaemonProcess(directory, env)
        stack.callback(images.untag, *IMAGES, client=engine)
        stack.callback(remove_containers, daemon, engine)
        stack.callback(daemon.close)
        daemon.start()
        daemon.deploy("my-deployment", images.fake_engine(engine), gpu=0,
                      additional_args=["--served-model-name", "default/my-model"])  # fmt: skip
        yield World(daemon, hub, upstreams, directory)


def fill(hub: FakeHub) -> None:
    hub.tokens.add(HF_TOKEN)
    header = json.dumps(TENSORS).encode()
    weights = len(header).to_bytes(8, "little") + header + bytes(57344)
    model = {"config.json": json.dumps(QWEN).encode(), "tokenizer.json": b"{}", "model.safetensors": weights,
             "tokenizer_config.json": b'{"chat_template": "{{ messages }}"}'}  # fmt: skip
    for repo in ("Qwen/Qwen2.5-1.5B-Instruct", "Qwen/Qwen3-1.7B", "Qwen/Qwen2.5-14B-Instruct"):
        hub.add(repo, model)
    hub.add("meta-llama/Llama-3.2-1B-Instruct", model)
    adapter = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "base_model_name_or_path": "Qwen/Qwen3-1.7B",
               "target_modules": ["q_proj", "v_proj"]}  # fmt: skip
    matrices = {
        f"base_model.model.model.layers.0.self_attn.q_proj.lora_{side}.weight": {
            "dtype": "BF16", "shape": shape, "data_offsets": [start, start + 1024],
        }
        for side, shape, start in (("A", [8, 64], 0), ("B", [64, 8], 1024))
    }  # fmt: skip
    header = json.dumps(matrices).encode()
    hub.add("premjatin/qwen-linear-algebra-coder",
            {"adapter_config.json": json.dumps(adapter).encode(),
             "adapter_model.safetensors": len(header).to_bytes(8, "little") + header + bytes(2048)})  # fmt: skip


def remove_containers(daemon: DaemonProcess, engine: docker.DockerClient) -> None:
    from tests.e2e.conftest import _remove_containers

    _remove_containers(daemon)


# --- steps ---------------------------------------------------------------------------------------------------------


class Step(NamedTuple):
    """One command or statement of a page, run. `error` is empty when it succeeded."""

    heading: str
    text: str
    out: str
    error: str

    @property
    def words(self) -> str:
        """It on one line, without comments."""
        lines = [line for line in self.text.splitlines() if not line.lstrip().startswith("#")]
        return " ".join(" ".join(lines).replace("\\ ", " ").split())

    def problem(self) -> str:
        """Why it did not do what it should: its error, or what its output lacks."""
        wanted = next((wanted for pattern, wanted in SAYS.items() if re.search(pattern, self.words)), "")
        return self.error or ("" if re.search(wanted, self.out) else f"its output has no {wanted!r}: {self.out[-500:]}")


SAYS = {
    r"^nemo chat |^curl |^response = oai_client|chat/completions": "Hello from .* as .*: ",
    r"^for chunk in stream": "Hello from .*: Write a haiku",
    r"v1/classify": "jailbreak",
    r"^nemo wait .* DELETED": "Deployment DELETED!",
    r"^nemo wait ": r"Gateway is ready!",
    r"^nemo .* list$|gateway provider get": r'"data": \[\s*\{',
    r"^nemo .* delete ": "✓ Deleted successfully",
    r"^(echo .* \| )?nemo .* create ": '"name": "',
}
"""What a step that looks so says when it worked; the first that fits."""


def run_block(heading: str, text: str, env: Mapping[str, str], directory: Path) -> list[Step]:
    """Its commands in one bash, one after the other whether they succeed or not, as if pasted into a terminal."""
    found = commands(text)
    place = Path(tempfile.mkdtemp(dir=directory))
    script = "".join(
        f"{{\n{command}\n}} >{place}/{i}.out 2>{place}/{i}.err\necho $? >{place}/{i}.code\n"
        for i, command in enumerate(found)
    )
    subprocess.run(["bash", "-c", script], env=env, cwd=directory, stdin=subprocess.DEVNULL, timeout=300, check=True)
    return [_ended(heading, command, place / str(i)) for i, command in enumerate(found)]


def _ended(heading: str, command: str, place: Path) -> Step:
    code = int(place.with_suffix(".code").read_text())
    out, err = place.with_suffix(".out").read_text(), place.with_suffix(".err").read_text()
    return Step(heading, command, out, f"exit code {code}: {err.strip()} {out.strip()}" if code else "")


Expected = Mapping[str, tuple[str, str]]
"""Beginning of the words of a step that fails, after its heading -> what its error says, and why that is right."""


def judge(steps: Sequence[Step], expected: Expected) -> str:
    """How many did what they should; a line for each that did not. Raises AssertionError for one not expected to."""
    failed = [(step, problem) for step in steps if (problem := step.problem())]
    lines = [f"{len(steps) - len(failed)} of {len(steps)} steps passed"]
    surprises = []
    for step, problem in failed:
        where = f"{step.heading}: {step.words}"
        said, why = next((known for start, known in expected.items() if where.startswith(start)), ("", ""))
        lines.append(f"  {where[:150]}\n    {why or problem}")
        if not why or said not in problem:
            surprises.append(f"{where}\n{problem}")
    assert not surprises, "\n".join([lines[0], *surprises])
    return "\n".join(lines)
