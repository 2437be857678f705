"""What can go wrong, for whom, and what they can do about it.

Every error has a `message` (what happened and why) and, where something can be done, a `hint` (what to type or change).

    NimhostError
    ├── BadRequest            400  the request cannot be carried out as written
    │   ├── BodyTooLarge      413
    │   └── MethodNotAllowed  405
    ├── InvalidRequest        422  fields of the request are wrong; `problems` names each of them
    ├── Forbidden             403  needs a setting or an administrator's token
    ├── Unauthorized          401  needs a token
    ├── NotFound              404
    ├── Conflict              409
    │   ├── AlreadyExists          the name is taken
    │   └── InUse                  something else still needs it
    ├── NotReady              503  known, but it cannot answer yet; `retry_after_s`
    ├── UpstreamError         502  an engine or provider could not be reached or broke off
    │   ├── ProviderRefused        it refused the key that nimhost sent
    │   └── Unreachable            said by the client: no nimhost answers at the address
    ├── UpstreamTimeout       504
    ├── RequestLoop           508  it has come back to the nimhost that sent it on
    ├── NotSupported          501  whoever would have to do it cannot
    ├── HostError             500  the machine said no
    │   ├── DockerUnavailable 503
    │   ├── DockerError            any other refusal of the Docker engine
    │   │   └── NameTaken          a container of that name exists
    │   ├── GpuRuntimeMissing      Docker cannot hand GPUs to containers
    │   ├── ImageNotFound
    │   ├── RegistryDenied         the registry wants (other) credentials
    │   ├── RegistryUnavailable    the registry cannot be reached, is busy, or stalled
    │   ├── GpuUnavailable
    │   ├── Unstorable             what one row is to say cannot be stored; other rows can
    │   ├── DiskFull          507
    │   ├── HubUnavailable    502  the model hub cannot be reached, is busy, or stalled
    │   ├── WeightsGated           the repository wants a licence accepted or a token
    │   ├── WeightsMissing         the repository, revision or files do not exist
    │   └── WeightsCorrupt         what came does not have the promised hash
    └── StartError                 nimhost itself cannot start (exit code 1)
        └── ConfigError            ... because of its settings (exit code 2)
"""

from __future__ import annotations

from typing import ClassVar


class Problem(dict[str, object]):
    """One wrong field, in the form the wire has: `type`, `loc`, `msg`, `input`."""

    def __init__(self, loc: tuple[str | int, ...], msg: str, type: str = "value_error", input: object = None) -> None:
        super().__init__(type=type, loc=list(loc), msg=msg, input=input)


def _writable(text: str) -> str:
    """A name of a file may hold what no encoding has: with that, a message could be neither stored nor sent."""
    return text.encode(errors="replace").decode()


class NimhostError(Exception):
    """The root. Raise a leaf; catch whatever level you can do something about."""

    final: ClassVar[bool] = True
    """Trying the same again cannot help."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = _writable(message)
        self.hint = None if hint is None else _writable(hint)

    def __str__(self) -> str:
        return self.message

    @property
    def in_full(self) -> str:
        """Message and hint as running text, for places that have one line for both."""
        end = "" if self.message.endswith((".", "!", "?", ":")) else "."
        return f"{self.message}{end} {self.hint}" if self.hint else self.message


class BadRequest(NimhostError):
    pass


class BodyTooLarge(BadRequest):
    pass


class MethodNotAllowed(BadRequest):
    pass


class InvalidRequest(NimhostError):
    def __init__(self, message: str, hint: str | None = None, problems: tuple[Problem, ...] = ()) -> None:
        super().__init__(message, hint)
        self.problems = problems

    @classmethod
    def field(cls, msg: str, *loc: str | int, input: object = None, type: str = "value_error") -> InvalidRequest:
        """One wrong field of the body: `InvalidRequest.field("must be at least 0", "executor_config", "gpu")`."""
        problem = Problem(("body", *loc), msg, type, input)
        return cls(f"{'.'.join(map(str, loc))}: {msg}", problems=(problem,))


class Forbidden(NimhostError):
    pass


class Unauthorized(NimhostError):
    pass


class NotFound(NimhostError):
    pass


class Conflict(NimhostError):
    pass


class AlreadyExists(Conflict):
    pass


class InUse(Conflict):
    pass


class NotReady(NimhostError):
    final = False

    def __init__(self, message: str, hint: str | None = None, retry_after_s: int = 5) -> None:
        super().__init__(message, hint)
        self.retry_after_s = retry_after_s


class UpstreamError(NimhostError):
    final = False


class ProviderRefused(UpstreamError):
    final = True


class Unreachable(UpstreamError):
    pass


class UpstreamTimeout(NimhostError):
    final = False


class RequestLoop(NimhostError):
    pass


class NotSupported(NimhostError):
    pass


class HostError(NimhostError):
    pass


class DockerUnavailable(HostError):
    final = False


class DockerError(HostError):
    final = False


class NameTaken(DockerError):
    pass


class GpuRuntimeMissing(HostError):
    pass


class ImageNotFound(HostError):
    pass


class RegistryDenied(HostError):
    pass


class RegistryUnavailable(HostError):
    final = False

    def __init__(self, message: str, hint: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message, hint)
        self.retry_after_s = retry_after_s


class GpuUnavailable(HostError):
    final = False


class Unstorable(HostError):
    pass


class DiskFull(HostError):
    final = False


class HubUnavailable(HostError):
    final = False

    def __init__(self, message: str, hint: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message, hint)
        self.retry_after_s = retry_after_s


class WeightsGated(HostError):
    pass


class WeightsMissing(HostError):
    pass


class WeightsCorrupt(HostError):
    final = False


class StartError(NimhostError):
    pass


class ConfigError(StartError):
    pass


STATUS: dict[type[NimhostError], int] = {
    NimhostError: 500,
    BadRequest: 400,
    BodyTooLarge: 413,
    MethodNotAllowed: 405,
    InvalidRequest: 422,
    Forbidden: 403,
    Unauthorized: 401,
    NotFound: 404,
    Conflict: 409,
    NotReady: 503,
    UpstreamError: 502,
    UpstreamTimeout: 504,
    RequestLoop: 508,
    NotSupported: 501,
    DockerUnavailable: 503,
    DiskFull: 507,
    HubUnavailable: 502,
}
"""HTTP status per class; a class that is not listed has its parent's (walked by MRO)."""


def status_of(error: NimhostError | type[NimhostError]) -> int:
    cls = error if isinstance(error, type) else type(error)
    return next(STATUS[base] for base in cls.__mro__ if base in STATUS)


def all_errors(root: type[NimhostError] = NimhostError) -> dict[str, type[NimhostError]]:
    """Every class of the tree by name, but for private ones: they do not leave their module."""
    tree = {} if root.__name__.startswith("_") else {root.__name__: root}
    for child in root.__subclasses__():
        tree |= all_errors(child)
    return tree


ERROR_HEADER = "x-nimhost-error"
"""Reply header that names the class, so that a client raises the same one."""


def from_reply(status: int, name: str | None, message: str, hint: str | None) -> NimhostError:
    """The error a reply stands for: the named class, or the plainest one with that status."""
    cls = all_errors().get(name or "") or next((c for c, s in STATUS.items() if s == status), NimhostError)
    return cls(message, hint)
