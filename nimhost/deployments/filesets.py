"""Where the files of a fileset can be read, without fetching all of it: in its directory, the cache, or on the hub."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from nimhost.deployments.observe import local_directory
from nimhost.deployments.repos import repo_of
from nimhost.deployments.storage import HubWeights, LocalWeights, weights_in
from nimhost.engines.order import Script
from nimhost.entities import Entity
from nimhost.errors import BadRequest, NotFound, WeightsGated, WeightsMissing
from nimhost.host.hub_files import HubFiles
from nimhost.host.threads import in_thread
from nimhost.host.weights import Weights
from nimhost.host.weights.source import Directory, Repository, Source
from nimhost.refs import Ref

PARSER_BYTES = 1 << 20


class Filesets:
    """Opens filesets. `secret`: the value of a secret; raises NotFound."""

    def __init__(self, weights: Weights, root: Path, secret: Callable[[Ref], Awaitable[str]]) -> None:
        self._weights = weights
        self._root = root
        self._secret = secret

    async def open(self, fileset: Entity) -> Source:
        """Raises WeightsMissing for a hub that may not be asked, BadRequest for a secret that does not exist."""
        where = weights_in(Ref(fileset.workspace, fileset.name), fileset.wish.storage, None)
        match where:
            case LocalWeights():
                return Directory(local_directory(where, self._root))
            case HubWeights():
                return await self._hub(where)

    async def _hub(self, where: HubWeights) -> Source:
        snapshot = await in_thread(self._weights.present, repo_of(where))
        if snapshot is not None:
            return Directory(Path(snapshot.path))
        if self._weights.offline:
            raise WeightsMissing(
                f"{where.repo_id} is not in the weights cache, and nimhost is set to work offline.",
                "Set [weights] offline = false.",
            )
        return Repository(repo_of(where), self._weights.endpoint, await self._token(where))

    async def confirm(self, where: HubWeights) -> None:
        """That they can be fetched, unless they are here already or the hub does not answer in time.

        Raises BadRequest, saying why they never can.
        """
        weights, repo = self._weights, repo_of(where)
        try:
            if await in_thread(weights.present, repo) is None:
                await HubFiles(weights.cache_dir, weights.endpoint, weights.offline).confirm(
                    repo, await self._token(where)
                )
        except (WeightsMissing, WeightsGated) as error:
            raise BadRequest(f"No weights to serve: {error.message}", error.hint) from error

    async def _token(self, where: HubWeights) -> str | None:
        if where.token_secret is None:
            return None
        try:
            return await self._secret(where.token_secret)
        except NotFound:
            raise BadRequest(
                f"Secret not found: {where.token_secret}",
                f"nimhost secrets create {where.token_secret.name} --from-file -",
            ) from None


async def read_tool_parser(source: Source, field: str) -> Script:
    """The one Python file of a plugin's fileset. Raises BadRequest, naming `field`, when there is not exactly one."""
    names = [name for name in await source.names() if name.endswith(".py")]
    if len(names) != 1:
        found = ", ".join(names) or "none"
        raise BadRequest(
            f"{field}: a plugin's fileset must have exactly one .py file, this one has {len(names)} ({found}).",
            "Put the parser into a fileset of its own, as one file.",
        )
    content = await source.read(names[0], PARSER_BYTES + 1)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise BadRequest(f"{field}: {names[0]} of {source} is not UTF-8 text.") from None
    if len(content) > PARSER_BYTES:
        raise BadRequest(f"{field}: {names[0]} of {source} is larger than {PARSER_BYTES:,} bytes.")
    return Script(names[0].rpartition("/")[2], text)
