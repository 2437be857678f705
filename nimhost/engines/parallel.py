"""How a model is split over GPUs: tensor parallel (TP, inside each layer) x pipeline parallel (PP, by layers). Pure.

What a tensor can be split by is vLLM's own rule, which the Multi-LLM NIM shares: attention heads divide by TP, and
key-value heads either divide by it or are repeated a whole number of times
(https://docs.vllm.ai/en/stable/serving/parallelism_scaling/ and `QKVParallelLinear` in its source).
"""

from __future__ import annotations

from nimhost.entities import ModelSpec
from nimhost.errors import BadRequest

TP_VARIABLE, PP_VARIABLE = "NIM_TENSOR_PARALLEL_SIZE", "NIM_PIPELINE_PARALLEL_SIZE"
TP_FLAG, PP_FLAG, DP_FLAG = "--tensor-parallel-size", "--pipeline-parallel-size", "--data-parallel-size"
ALIASES = {TP_FLAG: ("-tp",), PP_FLAG: ("-pp",), DP_FLAG: ("-dp",)}


def splits(spec: ModelSpec | None, size: int) -> bool:
    """Whether the model can be split `size` ways inside its layers. Without a spec the engine will have to say."""
    if spec is None or size == 1:
        return True
    heads, kv_heads = spec.num_attention_heads, spec.num_kv_heads
    shared = kv_heads % size == 0 or size % kv_heads == 0
    return shared and all(n % size == 0 for n in (heads, spec.hidden_size, spec.ffn_hidden_size))


def tensor_parallel_size(gpus: int, spec: ModelSpec | None) -> int:
    """The largest divisor of `gpus` that the model can be split by."""
    return next(n for n in range(max(gpus, 1), 0, -1) if max(gpus, 1) % n == 0 and splits(spec, n))


# --- vLLM ----------------------------------------------------------------------------------------------------------


def given(flag: str, arguments: list[str]) -> bool:
    """Whether the user set `flag` already, as `--flag`, `--flag=value`, with underscores, or by its short form."""
    return any(argument.partition("=")[0] in _forms(flag) for argument in arguments)


def value_of(flag: str, arguments: list[str]) -> str | None:
    """The value the user gave `flag`, the last one as argparse has it; None without one."""
    found = None
    for at, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name in _forms(flag):
            found = value if equals else next(iter(arguments[at + 1 : at + 2]), None)
    return found


class VllmSplit:
    """What a vLLM deployment's arguments and GPUs come to. Raises BadRequest for what can never start."""

    def __init__(self, gpus: int, arguments: list[str], spec: ModelSpec | None) -> None:
        field = "executor_config.additional_args"
        sizes = {flag: _whole(value_of(flag, arguments), flag, field) for flag in ALIASES}
        tp, pp, dp = sizes.values()
        others = (pp or 1) * (dp or 1)
        self.gpus, self.replicas, self._spec, self._arguments = gpus, dp or 1, spec, arguments
        self.tp = tp or tensor_parallel_size(gpus // others, spec)
        self.used = self.tp * others
        if gpus and self.used > gpus:
            asked = " x ".join(f"{flag} {size}" for flag, size in sizes.items() if size)
            raise BadRequest(
                f"{field}: {asked} needs {self.used} GPUs, but executor_config.gpu is {gpus}.",
                f"Set executor_config.gpu to {self.used}, or make one of the sizes smaller.",
            )
        if tp and not splits(spec, tp):
            hint = _possible(spec, max(gpus, 1) // (dp or 1), TP_FLAG, PP_FLAG)
            raise BadRequest(f"{field}: {TP_FLAG} {tp}: {_why_not(spec, tp)}", hint)

    @property
    def warnings(self) -> tuple[str, ...]:
        idle = self.gpus - self.used
        if idle <= 0:
            return ()
        why = "" if given(TP_FLAG, self._arguments) else _why_not(self._spec, self.gpus // self.replicas)
        ask = f"Set executor_config.gpu to {self.used}{self._all}."
        return (f"{idle} of {self.gpus} GPUs stay idle{f': {why}' if why else '.'} {ask}",)

    @property
    def _all(self) -> str:
        """How every GPU would have something to do, where the model and the sizes that were given allow it."""
        each, left = divmod(self.gpus, self.replicas)
        fits = [n for n in range(1, each + 1) if each % n == 0 and splits(self._spec, n)]
        if given(TP_FLAG, self._arguments):
            fits = [n for n in fits if n == self.tp]
        if left or not fits:
            return ""
        wide = max(fits)
        return f", or use all of them with {PP_FLAG} {each // wide} in executor_config.additional_args"


# --- NIM -----------------------------------------------------------------------------------------------------------


def nim_split(gpus: int, envs: dict[str, str], spec: ModelSpec | None = None) -> dict[str, str]:
    """Both variables of the Multi-LLM NIM: TP x PP = gpus. TP = gpus by default; one given, the other follows.

    Nothing for a single GPU. With a `spec`, also whether the model can be split that way. Raises BadRequest.
    """
    field = "executor_config.additional_envs"
    tp, pp = (_whole(envs.get(name), name, field) for name in (TP_VARIABLE, PP_VARIABLE))
    if gpus <= 1 and (tp or 1) * (pp or 1) == 1:
        return {}
    total = max(gpus, 1)
    wide, deep = tp or total // (pp or 1), pp or total // (tp or total)
    if wide * deep != total:
        asked = " x ".join(f"{name}={n}" for name, n in ((TP_VARIABLE, tp), (PP_VARIABLE, pp)) if n)
        raise BadRequest(
            f"{field}: {asked} does not make executor_config.gpu = {gpus}.",
            f"gpu = {TP_VARIABLE} x {PP_VARIABLE}: change one of the three.",
        )
    if not splits(spec, wide):
        where = f"{field}.{TP_VARIABLE}" if tp else "executor_config.gpu"
        raise BadRequest(f"{where}: {_why_not(spec, wide)}", _possible(spec, total, TP_VARIABLE, PP_VARIABLE))
    return {TP_VARIABLE: str(wide), PP_VARIABLE: str(deep)}


# --- small words ---------------------------------------------------------------------------------------------------


def _forms(flag: str) -> set[str]:
    return {flag, flag.replace("-", "_").replace("__", "--", 1), *ALIASES.get(flag, ())}


def _whole(text: str | None, name: str, field: str) -> int | None:
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 0 < int(text) <= 4096):
        message = f"{field}: {name} is '{text[:40]}', which is not a number of GPUs."
        raise BadRequest(message, "Write a whole number from 1.")
    return int(text)


def _why_not(spec: ModelSpec | None, size: int) -> str:
    if spec is None or splits(spec, size):
        return ""
    return (
        f"a model with {spec.num_attention_heads} attention heads, {spec.num_kv_heads} key-value heads and"
        f" a feed-forward size of {spec.ffn_hidden_size} cannot be split over {size} GPUs."
    )


def _possible(spec: ModelSpec | None, gpus: int, wide: str, deep: str) -> str:
    """Every way to use that many GPUs, by the names of both sizes, the widest first."""
    pairs = [(n, gpus // n) for n in range(gpus, 0, -1) if gpus % n == 0 and splits(spec, n)]
    ways = ", or ".join(f"{wide} {tp} with {deep} {pp}" for tp, pp in pairs)
    return f"On {gpus} GPU{'' if gpus == 1 else 's'} it can be {ways}."
