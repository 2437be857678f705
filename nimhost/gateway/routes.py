"""Where a request goes: an immutable table, built whole from plain records and swapped whole. Pure.

Upstream    what is known about a provider: where it is, what it serves, what is put into its requests
Route       an upstream with everything prepared that need not be done for each request
Target      a route and the name by which the model is known there
RouteTable  provider | model -> Route | Target, or the error that says why not
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from itertools import chain, islice
from typing import Any, NamedTuple

import msgspec
from msgspec import Raw, Struct

from nimhost.entities import BackendFormat, ServedModel
from nimhost.errors import InvalidRequest, NimhostError, NotFound, NotReady
from nimhost.gateway.paths import Policy, target_url
from nimhost.refs import DEFAULT_WORKSPACE, NAME_RULE, Ref, is_adapter_name, is_name

NEAR_CANDIDATES = 60
"""So many names are compared for "did you mean": difflib takes some 20 µs for each."""
HOP = "x-nimhost-hop"
"""Header that names whom a request went through, once for each."""
SPEAK_BOTH: frozenset[Policy] = frozenset({"vllm"})
"""Engines that serve OpenAI's chat and Anthropic's messages themselves."""


class Upstream(Struct, frozen=True, kw_only=True):
    """A provider as the gateway sees it. Headers and extra bodies are put in as follows, the later one winning:
    `default_*`, the client's own, `required_*`, `headers`.
    """

    provider: Ref
    base_url: str
    policy: Policy = "external"
    headers: tuple[tuple[str, str], ...] = ()
    """Always set, over everything: the key of the provider. Never shown."""
    default_headers: dict[str, str] = {}
    required_headers: dict[str, str] = {}
    default_body: dict[str, Any] = {}
    required_body: dict[str, Any] = {}
    ready: bool = True
    message: str = ""
    """Why it is not ready."""
    proven: bool = True
    """It has answered when asked what it serves: what `/ready` tells. Requests are sent to it before that, too."""
    served: tuple[ServedModel, ...] = ()
    """`model_entity_id` is `workspace/` and whatever a client may call it there: `name`, or `ws--adapter`."""
    hop: str = ""
    """What marks requests to it as sent on by us. Only for what is elsewhere, which may lead back here."""
    absent: dict[str, str | None] = {}
    """Adapters that it is not to be asked for -> why they wait, or None for those that nobody wants any more."""

    def __repr__(self) -> str:
        return f"Upstream({self.provider}, {self.base_url}, {self.policy}, ready={self.ready})"


class Route(Struct, frozen=True, kw_only=True, eq=False):
    upstream: Upstream
    set_headers: tuple[tuple[str, str], ...]
    """Required headers and the key; names in lower case."""
    set_names: frozenset[bytes]
    """Headers of the client that `set_headers` replaces."""
    set_lines: bytes
    """`set_headers` as they are sent."""
    default_lines: tuple[tuple[bytes, bytes], ...]
    """Name -> the line that is sent unless the client has that header."""
    default_body: dict[str, Raw]
    required_body: dict[str, Raw]

    @property
    def merges(self) -> bool:
        """A JSON body gets extras."""
        return bool(self.default_body or self.required_body)

    def __repr__(self) -> str:
        return f"Route({self.upstream!r})"

    def check_adapter(self, name: str) -> None:
        """For a model that the provider's route was asked for. Raises NotReady, NotFound for an absent adapter."""
        if name in self.upstream.absent:
            reason, ref = self.upstream.absent[name], Ref(self.upstream.provider.workspace, name)
            raise NotFound(f"Model entity not found for {ref}", _SEE_MODELS) if reason is None else _waits(ref, reason)

    def url(self, tail: str) -> str:
        """Raises what `paths.target_url` raises."""
        return target_url(self.upstream.base_url, self.upstream.policy, tail)


class Target(NamedTuple):
    """Somebody who can answer a request."""

    ref: Ref
    """Of the model, or of the provider where that was asked for."""
    route: Route
    served_name: str = ""
    served_json: Raw | None = None
    """The same as JSON; None: the name in the body stays as it is."""
    priority: int = 0
    """The lowest is used as long as it is well: what runs here before what is elsewhere."""
    speaks: BackendFormat | None = None
    """The only chat format it understands; None: nothing is translated."""


class RouteTable(Struct, frozen=True, kw_only=True, eq=False):
    """The whole routing of one moment. `models` has what can be reached now, the best target first."""

    providers: dict[Ref, Target] = {}
    models: dict[Ref, tuple[Target, ...]] = {}
    waiting: dict[Ref, str] = {}
    """Models that something is to serve but does not yet, with the reason."""
    known: frozenset[Ref] = frozenset()
    """All model entities."""
    aliases: dict[Ref, Ref] = {}
    """Other names that lead nowhere -> the model that they stand for."""
    idle_adapters: dict[Ref, str] = {}
    """Adapters that nothing is to serve -> why."""
    created: dict[Ref, int] = {}
    """When those in `models` were made: Unix time in seconds."""
    served_ids: dict[str, tuple[Ref, ...]] = {}
    """What engines and providers call a model -> the models of ours."""
    workspaces: frozenset[str] = frozenset()
    """Empty: not checked."""

    def provider(self, workspace: str, name: str) -> Target:
        """Raises NotFound, NotReady, or InvalidRequest for what cannot be a name."""
        ref = Ref(workspace, name)
        target = self.providers.get(ref)
        if target is None:
            _check_names("provider", ref)
            near = _did_you_mean(name, (str(other) for other in self.providers))
            raise NotFound(f"Model provider not found for {ref}", near or _SEE_PROVIDERS)
        if not target.route.upstream.ready:
            raise _not_ready(f"Provider {ref}", target.route.upstream.message)
        return target

    def model(self, workspace: str, name: str) -> tuple[Target, ...]:
        """Who serves a model of this workspace; `name` may begin with `workspace/`.

        Raises NotFound with near matches, NotReady with the deployment's own message, InvalidRequest for what cannot
        be a name (a vendor's id, say), naming the model to use instead.
        """
        targets = self.models.get(Ref(workspace, name.removeprefix(f"{workspace}/")))
        if targets:
            return targets
        raise self._why_not(workspace, name)

    def any_model(self, model: str) -> tuple[Target, ...]:
        """For the short route: `workspace/name`, a name in the default workspace, or a vendor's id with one provider.

        Raises NotFound, NotReady or, for a vendor's id that several providers serve, InvalidRequest.
        """
        workspace, slash, name = model.partition("/")
        ref = Ref(workspace, name) if slash else Ref(DEFAULT_WORKSPACE, model)
        if targets := self.models.get(ref):
            return targets
        if ids := self._ids_of(model):
            return self._by_served_id(model, ids)
        raise self._missing(ref)

    def called(self, served_name: str, target: Target) -> Target:
        """Whom a provider's own route leads to, under the model that is asked for there: `target` itself if there is
        none of that name."""
        for ref in self.served_ids.get(served_name, ()):
            for found in self.models.get(ref, ()):
                if found.served_name == served_name and found.route is target.route:
                    return found
        return target

    def reachable(self, workspace: str | None = None) -> list[Ref]:
        """Models that can be reached now, sorted. Raises NotFound for a workspace that does not exist."""
        if workspace is not None:
            self._check_workspace(workspace)
        return sorted(ref for ref in self.models if workspace in (None, ref.workspace))

    def _by_served_id(self, served_name: str, ids: tuple[Ref, ...]) -> tuple[Target, ...]:
        found = [target for ref in ids for target in self.models.get(ref, ()) if target.served_name == served_name]
        providers = {target.route.upstream.provider for target in found}
        if len({target.ref for target in found}) == 1:
            return self.models[found[0].ref]  # one entity, however many serve it
        if found and is_adapter_name(served_name):
            return tuple(found)  # the same one wherever it is: there is nothing to choose
        if len(providers) == 1:
            return (found[0],)
        if found:
            names = ", ".join(str(ref) for ref in ids)
            raise InvalidRequest(f"'{served_name}' is served by {len(providers)} providers.", f"Use one of {names}.")
        raise _waits(ids[0], self.waiting.get(ids[0], ""))

    # --- why not: only on the way to an error

    def _why_not(self, workspace: str, name: str) -> NimhostError:
        own = name.removeprefix(f"{workspace}/")
        if Ref(workspace, own) in self.waiting or Ref(workspace, own) in self.known:
            return self._missing(Ref(workspace, own))
        if not is_name(own) and "--" not in own:
            return InvalidRequest(f"Invalid model: '{name}' is not a model of workspace {workspace}: {NAME_RULE}.",
                                  self._instead(workspace, name))  # fmt: skip
        return self._missing(Ref(workspace, own))

    def _instead(self, workspace: str, name: str) -> str:
        """The model to use instead of a vendor's id or another workspace's model."""
        ids = [ref for ref in self._ids_of(name) if ref.workspace == workspace]
        if ids:
            return f"Use {ids[0]}."
        elsewhere, _, own = name.partition("/")
        if Ref(elsewhere, own) in self.models:
            return f"Use the route of its own workspace, {elsewhere}."
        return _SEE_MODELS

    def _ids_of(self, served_name: str) -> tuple[Ref, ...]:
        return self.served_ids.get(served_name, ())

    def _missing(self, ref: Ref) -> NimhostError:
        if ref in self.waiting:
            return _waits(ref, self.waiting[ref])
        if target := self.aliases.get(ref):
            why = "which nothing serves" if target in self.known else "which does not exist"
            return NotFound(f"No providers found for model entity {ref}: it is another name for {target}, {why}.",
                            f"See: nimhost inference virtual-models get {ref.name}")  # fmt: skip
        if ref in self.idle_adapters:
            why = f"No providers found for model entity {ref}: {self.idle_adapters[ref]}"
            return NotFound(why, _see_adapter(ref))
        if ref in self.known:
            return NotFound(f"No providers found for model entity {ref}", "Deploy it: nimhost deploy --help")
        try:
            self._check_workspace(ref.workspace)
        except NotFound as error:
            return error
        names = {**self.models, **self.waiting, **self.idle_adapters}
        adapter = Ref(ref.workspace, f"{ref.workspace}--{ref.name}")
        near = f"Did you mean {adapter}?" if adapter in names else _did_you_mean(ref.name, map(str, names))
        return NotFound(f"Model entity not found for {ref}", near or _SEE_MODELS)

    def _check_workspace(self, workspace: str) -> None:
        if self.workspaces and workspace not in self.workspaces:
            raise NotFound(f"Workspace not found: {workspace}", "See: nimhost workspaces list")


_SEE_MODELS = "See what can be reached: nimhost inference models list"
_SEE_PS = "See: nimhost ps"
_SEE_PROVIDERS = "See: nimhost inference providers list"


def build_table(
    upstreams: Iterable[Upstream],
    models: Iterable[Ref] = (),
    waiting: Mapping[Ref, str] | None = None,
    workspaces: Iterable[str] = (),
    formats: Mapping[Ref, BackendFormat] | None = None,
) -> RouteTable:
    """The table for these providers. Of several that serve a model `balance` chooses.

    `models`: every model entity. `waiting`: models whose deployment is under way, with its message. `workspaces`: all
    of them; when none are given they are not checked. `formats`: of models that are not spoken to in OpenAI's.
    """
    routes = {upstream.provider: _prepare(upstream) for upstream in upstreams}
    targets: dict[Ref, list[Target]] = {}
    pending: dict[Ref, str] = dict(waiting or {})
    ids: dict[str, dict[Ref, None]] = {}
    for route in routes.values():
        for served in route.upstream.served:
            ref = Ref(*served.model_entity_id.split("/", 1))
            ids.setdefault(served.served_model_name, {})[ref] = None
            if route.upstream.ready:
                name = served.served_model_name
                away = int(route.upstream.policy == "external")
                speaks = None if route.upstream.policy in SPEAK_BOTH else (formats or {}).get(ref, "OPENAI_CHAT")
                target = Target(ref, route, name, Raw(msgspec.json.encode(name)), away, speaks)
                targets.setdefault(ref, []).append(target)
            else:
                pending.setdefault(ref, route.upstream.message)
        for name, reason in route.upstream.absent.items():
            ref = Ref(route.upstream.provider.workspace, name)
            if reason is not None:
                pending.setdefault(ref, reason)
                ids.setdefault(name, {})[ref] = None
    return RouteTable(
        providers={ref: Target(ref, route) for ref, route in routes.items()},
        models={ref: tuple(found) for ref, found in targets.items()},
        waiting={ref: message for ref, message in pending.items() if ref not in targets},
        known=frozenset(models),
        served_ids={name: tuple(refs) for name, refs in ids.items()},
        workspaces=frozenset(workspaces),
    )


def _prepare(upstream: Upstream) -> Route:
    fixed = {name.lower(): value for name, value in upstream.required_headers.items()}
    fixed |= {name.lower(): value for name, value in upstream.headers}
    defaults = {name.lower(): value for name, value in upstream.default_headers.items() if name.lower() not in fixed}
    marks = [(HOP, upstream.hop)] if upstream.hop else []
    return Route(
        upstream=upstream,
        set_headers=tuple(fixed.items()),
        set_names=frozenset(name.encode() for name in fixed),
        set_lines=b"".join(_line(name, value) for name, value in [*fixed.items(), *marks]),
        default_lines=tuple((name.encode(), _line(name, value)) for name, value in defaults.items()),
        default_body={key: Raw(msgspec.json.encode(value)) for key, value in upstream.default_body.items()},
        required_body={key: Raw(msgspec.json.encode(value)) for key, value in upstream.required_body.items()},
    )


def _line(name: str, value: str) -> bytes:
    """A header as it is sent; what would end the line is left out of it."""
    return "".join(char for char in f"{name}: {value}" if char >= " " or char == "\t").encode() + b"\r\n"


def _not_ready(what: str, reason: str) -> NotReady:
    return NotReady(f"{what} is not ready: {_first_line(reason)}" if reason else f"{what} is not ready.", _SEE_PS)


def _first_line(message: str) -> str:
    """What a client is told of a status: the logs of an engine, which may follow, are for those who look after it."""
    return message.partition("\n")[0].rstrip()


def _waits(ref: Ref, reason: str) -> NotReady:
    if not is_adapter_name(ref.name):
        return _not_ready(f"Model {ref}", reason)
    return NotReady(f"Adapter {ref.name} is not ready: {_first_line(reason)}", _see_adapter(ref))


def _see_adapter(ref: Ref) -> str:
    workspace, _, name = ref.name.partition("--")
    where = "" if workspace == DEFAULT_WORKSPACE else f" --workspace {workspace}"
    return f"See: nimhost adapters get {name}{where}"


def _check_names(kind: str, ref: Ref) -> None:
    for part in ref:
        if not is_name(part):
            raise InvalidRequest(f"Invalid {kind}: '{part}' is not a name: {NAME_RULE}.")


def _did_you_mean(name: str, candidates: Iterable[str]) -> str | None:
    """The nearest names in a sentence. Looks closely only at a few, so that 10,000 models do not stop the loop."""
    names, start = list(candidates), name[:3].lower()
    alike = chain((c for c in names if start in c.lower()), names)
    own = {c.partition("/")[2]: c for c in islice(alike, NEAR_CANDIDATES)}
    near = difflib.get_close_matches(name, own, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(own[match] for match in near)}?" if near else None
