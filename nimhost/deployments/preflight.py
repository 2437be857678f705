"""What this machine cannot run, found before a byte is fetched: each with the sum and the change that helps. Pure.

A reading that failed blocks nothing here: who needs it meets the failure itself.
"""

from __future__ import annotations

from collections.abc import Sequence

from nimhost.deployments.desired import Desired
from nimhost.deployments.driver import NEWER_DRIVER, too_old
from nimhost.deployments.fit import fit_on, gib, refusal
from nimhost.deployments.observed import GpuSlot, Observed, Room
from nimhost.deployments.storage import HubWeights
from nimhost.engines.numbers import tokens
from nimhost.engines.order import Order
from nimhost.engines.parallel import given, value_of
from nimhost.errors import BadRequest
from nimhost.models.memory import BLOCK, GIB

UNPACKED = 2
"""Images of CUDA libraries take at least so many times on disk what registries send of them: vLLM's is sent as 12 GB
(https://github.com/vllm-project/vllm/issues/27154) and takes 28.6 (https://github.com/vllm-project/vllm/pull/22377).
The low end, so that only what surely lacks room is refused."""
NO_RUNTIME = (
    "Docker cannot give GPUs to containers on this machine.\n"
    "Install the NVIDIA container toolkit, then run: "
    "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker"
)
ALLOW_LONG = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
STRETCHING = ("--config", "--hf-overrides", "--rope-scaling")
"""With one of these a model may take a longer context than its config.json says."""
ENCODER_DECODERS = (
    "BartForConditionalGeneration", "MBartForConditionalGeneration", "MT5ForConditionalGeneration",
    "MarianMTModel", "PegasusForConditionalGeneration", "T5ForConditionalGeneration", "UMT5ForConditionalGeneration",
)  # fmt: skip
"""Text models with an encoder and a decoder: vLLM serves none since its version 0.11
(https://docs.vllm.ai/en/stable/usage/v1_guide/). Any other architecture may be new: the engine will say."""


def check_wish(
    d: Desired, slots: Sequence[GpuSlot], weights_problem: str | None, force: bool, gpu_problem: str | None = None
) -> None:
    """Refuse a deployment that can never work here, before it is stored.

    `weights_problem`: what is wrong with a directory of weights. `force`: whether it fits is the person's business.
    `gpu_problem`: why GPUs could not be read, or not all. Raises BadRequest, naming the field.
    """
    if d.problem is not None:
        raise BadRequest(d.problem)
    if d.gpus > len(slots):
        raise _too_many(d, len(slots), gpu_problem)
    if weights_problem is not None:
        hint = "Name the directory that holds config.json and the *.safetensors files."
        raise BadRequest(f"No weights to serve. {weights_problem}", hint)
    if found := _large_share(d, [slot.total_bytes for slot in slots]):
        raise BadRequest(*found)
    if not force and (found := never(d, [slot.total_bytes for slot in slots])):
        raise BadRequest(*found)


def _too_many(d: Desired, there: int, problem: str | None) -> BadRequest:
    has = f"{there} GPU{'' if there == 1 else 's'}" if there else "no GPU"
    why = f" that can be used: {problem}" if problem else ""
    said = f"executor_config.gpu: config '{d.entity.wish.config}' asks for {d.gpus}, this machine has {has}{why}."
    return BadRequest(said, _fewer_gpus(there, problem))


def _fewer_gpus(there: int, problem: str | None) -> str:
    without = "Deploy without one: --gpu 0 (in a config: executor_config.gpu = 0)"
    if problem:
        return f"See what there is with: nimhost gpus, and nvidia-smi. {without}"
    return "See what is there with: nimhost gpus" if there else without


def _large_share(d: Desired, totals_bytes: Sequence[int]) -> tuple[str, str] | None:
    """(why its share can never be had of as many GPUs as it wants, what would help). What is not measured is enough."""
    share_gib = d.order.executor.gpu_memory_gib if d.order else None
    large = sorted(totals_bytes, reverse=True)[: d.gpus]
    if not (share_gib and large and 0 < large[-1] < share_gib * GIB):
        return None
    enough = sum(size >= share_gib * GIB for size in large)
    said = f"the largest here has {gib(large[0])}" if not enough else f"only {enough} of them have that much here"
    what = f"each of {d.gpus} GPUs" if d.gpus > 1 else "a GPU"
    fewer = "the GPUs alone, or ask for fewer" if d.gpus > 1 else "a GPU alone"
    return (
        f"executor_config.gpu_memory_gib: {share_gib:g} GiB of {what} are asked for, {said}.",
        f"Leave it out to have {fewer}.",
    )


def never(d: Desired, totals_bytes: Sequence[int]) -> tuple[str, str] | None:
    """(why the model cannot run on these GPUs, were they empty, what would help)."""
    if d.order is None:
        return None
    return _unsupported(d.order) or _too_long(d.order) or refusal(d.order, d.ask, totals_bytes)


def more_memory(d: Desired, observed: Observed) -> str:
    """What would give its engine more GPU memory, for one that ran out of it; empty where nothing is known."""
    totals = [slot.total_bytes for slot in observed.gpus]
    if found := never(d, totals):
        return found[1]
    known = fit_on(d.order, d.ask, totals) if d.order else None
    if known is None or d.order is None or d.order.engine != "vllm":
        return ""
    shorter = known.model_len // 2 // BLOCK * BLOCK
    return f"Give it more GPUs (--gpu N), or less context: --arg --max-model-len --arg {shorter}" if shorter else ""


def _unsupported(order: Order) -> tuple[str, str] | None:
    spec = order.model.spec if order.model else None
    if order.engine != "vllm" or spec is None or spec.checkpoint_model_name not in ENCODER_DECODERS:
        return None
    what = f"vLLM does not serve {spec.checkpoint_model_name}: models with an encoder and a decoder are not supported."
    return what, "Use an engine that does: --engine generic --image NAME:TAG --health-path PATH. To try anyway: --force"


def _too_long(order: Order) -> tuple[str, str] | None:
    """A context that vLLM refuses because the model was not made for it."""
    positions = context_limit(order)
    if positions is None:
        return None
    asked = tokens(value_of("--max-model-len", order.executor.additional_args))
    return (
        f"--max-model-len {asked}: the model was made for {positions} tokens, and vLLM takes no longer context.",
        f"Make it shorter: --arg --max-model-len --arg {positions}. To have it all the same, whatever it answers then: "
        f"--env {ALLOW_LONG}=1",
    )


def context_limit(order: Order) -> int | None:
    """The longest context of the model, where a longer one is asked for that vLLM would refuse."""
    spec, args = order.model.spec if order.model else None, order.executor.additional_args
    positions = spec.memory.positions if spec and spec.memory else 0
    asked = tokens(value_of("--max-model-len", args)) or 0
    allowed = (order.executor.additional_envs or {}).get(ALLOW_LONG, "0") not in ("", "0")
    if order.engine != "vllm" or not 0 < positions < asked or allowed or any(given(f, args) for f in STRETCHING):
        return None
    return positions


def blocked(d: Desired, observed: Observed) -> str | None:
    """Rule 10 of the plan: why a deployment cannot start on this machine as it is now, with the change that helps.

    1 more GPUs than there are, or a share that is larger than they are · 2 Docker cannot hand out GPUs · 3 image made
    for other machines, or for a newer driver · 4 the model does not fit, or its architecture is not supported · 5 no
    room on disk for what is to be fetched. A person can overrule 3-5.
    """
    wanted, there = d.gpus, len(observed.gpus)
    if wanted > there:
        short = f"there are {there}" if there else "there are none"
        why = f" ({observed.gpu_problem})" if observed.gpu_problem else ""
        said = f"Not enough GPUs on this system: {d.ref} needs {wanted}, {short}{why}."
        return f"{said}\n{_fewer_gpus(there, observed.gpu_problem)}"
    if found := _large_share(d, [slot.total_bytes for slot in observed.gpus]):
        return "\n".join(found)
    if wanted and observed.gives_gpus is False:
        return NO_RUNTIME
    if d.entity.wish.force:
        return None
    return _other_machine(d, observed) or _old_driver(d, observed) or _no_fit(d, observed) or no_room(d, observed)


def _other_machine(d: Desired, observed: Observed) -> str | None:
    image, machine = observed.made_for.get(d.ref, ""), observed.machine
    if not (image and machine) or image == machine:
        return None
    return (
        f"Image {d.image} is made for {image}, and this machine is {machine}.\n"
        f"Use one that is made for it: --image NAME:TAG (docker pull --platform linux/{machine} {d.image} tells whether"
        " there is one under this name)"
    )


def _old_driver(d: Desired, observed: Observed) -> str | None:
    required = observed.requires.get(d.ref, "") if d.gpus else ""
    missing = too_old(required, observed.driver, observed.cuda)
    return f"Image {d.image} {missing}.\n{NEWER_DRIVER}" if missing else None


def _no_fit(d: Desired, observed: Observed) -> str | None:
    found = never(d, [slot.total_bytes for slot in observed.gpus])
    return "\n".join(found) if found else None


def no_room(d: Desired, observed: Observed) -> str | None:
    """The sum, where what is still to be fetched does not fit on the disk."""
    room = observed.rooms.get(d.ref)
    if room is None:
        return None
    weights = weights_needed(d, room) if observed.weights.get(d.ref) is None else 0
    image = image_needed(d, observed) if observed.images.get(d.ref) is None else 0
    demands = [
        ("weights", weights, room.weights_free_bytes, room.weights_path),
        (f"image {d.image}", image, room.images_free_bytes, room.images_path),
    ]
    if room.same and weights and image:
        demands = [("weights and the image", weights + image, room.weights_free_bytes, room.weights_path)]
    for what, needed, free, path in demands:
        promised = room.promised_bytes if path == room.weights_path or room.same else 0
        if free is not None and needed > free - promised:
            others = f", of which {gib(promised)} are promised to other downloads" if promised else ""
            found = f"about {gib(needed)} GiB at {path}, {gib(free)} are free{others}"
            return f"No room for the {what}: {found}.\n{_MAKE_ROOM}{_ANYWAY if image else ''}"
    return None


_MAKE_ROOM = (
    "Make room (nimhost weights prune, docker image prune): a deployment then goes on by itself, within a minute. "
    "Or set [weights] cache_dir to another disk."
)
_ANYWAY = " To try anyway, since layers that other images share take no room again: --force"


def weights_needed(d: Desired, room: Room) -> int:
    """Bytes still to be fetched from the hub; 0 where that is not known."""
    spec = d.order.model.spec if d.order and d.order.model else None
    if not isinstance(d.weights, HubWeights) or spec is None or spec.memory is None:
        return 0
    return max(0, spec.memory.disk_bytes - room.weights_there_bytes)


def image_needed(d: Desired, observed: Observed) -> int:
    """Bytes that the image will take, about: unpacked, and where Docker keeps that too, as it came
    (https://docs.docker.com/engine/storage/containerd/). 0 where its registry does not say its size.
    """
    return observed.downloads.get(d.ref, 0) * (UNPACKED + observed.keeps_packed)
