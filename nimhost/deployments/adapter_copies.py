"""From the fileset of an adapter to a copy that engines can load: looked at first, fetched, checked, copied."""

from __future__ import annotations

import functools
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

from msgspec import Struct

from nimhost.deployments.adapters import Copy, Wanted
from nimhost.deployments.filesets import Filesets
from nimhost.deployments.observe import local_directory
from nimhost.deployments.repos import repo_of
from nimhost.deployments.storage import HubWeights, LocalWeights, ref_in, weights_in
from nimhost.engines.spec import WEIGHTS_DIR
from nimhost.entities import Entity, HuggingFaceStorage, Json, LocalStorage
from nimhost.errors import BadRequest, InvalidRequest, Problem, WeightsMissing
from nimhost.host.adapter_files import AdapterFiles
from nimhost.host.threads import in_thread
from nimhost.host.weights import Weights, WeightsProgress
from nimhost.host.weights.source import Directory, Source
from nimhost.host.weights.spec import read_tensors
from nimhost.models.adapter import CONFIG, SAFETENSORS, Base, Flaw, find_flaw, rank_of
from nimhost.models.spec import spec_of
from nimhost.refs import Ref, parse_ref
from nimhost.store import Store

CONFIG_BYTES = 1 << 20


class Look(Struct, frozen=True, kw_only=True):
    """What the small files of an adapter say."""

    rank: int
    flaw: Flaw | None = None


class AdapterCopies:
    """`secret`: the value of a secret; raises NotFound."""

    def __init__(
        self, store: Store, filesets: Filesets, weights: Weights, files: AdapterFiles, files_root: Path,
        secret: Callable[[Ref], Awaitable[str]],
    ) -> None:  # fmt: skip
        self.files = files
        self._store = store
        self._filesets = filesets
        self._weights = weights
        self._files_root = files_root
        self._secret = secret
        self._known: dict[Ref, tuple[str, Copy]] = {}
        """Adapter -> identity of its files and the copy that was made of them: so nothing is read again."""

    async def look(self, fileset: Entity, model: Entity) -> Look:
        """Of the files where they are, without fetching the weights. Raises a HostError, BadRequest."""
        return await _look(await self._filesets.open(fileset), await self._base(model))

    async def check(self, fileset: Entity, model: Entity) -> int:
        """The rank of an adapter that somebody registers. Files that are still to be uploaded are no mistake.

        Raises InvalidRequest, naming the field, for what no engine of this model can load; a HostError.
        """
        found = await self.look(fileset, model)
        uploaded = isinstance(fileset.wish.storage, LocalStorage) and fileset.wish.storage.path is None
        if found.flaw is not None and not (found.flaw.missing and uploaded):
            text = f"{fileset.ref}: {found.flaw.message}"
            raise InvalidRequest(f"fileset: {text}", problems=(Problem(("body", "fileset"), text),))
        return found.rank

    async def bring(self, w: Wanted, on_progress: Callable[[WeightsProgress], None]) -> Copy:
        """The copy of an adapter as its files are now. Raises NimhostError with what is missing or wrong."""
        model, fileset = await self._references(w)
        where = weights_in(Ref(fileset.workspace, fileset.name), fileset.wish.storage, None)
        source = await self._source(where, on_progress)
        identity = await in_thread(self.files.identity, source)
        directory = await in_thread(self.files.find, w.model, w.name, identity)
        seen, copy = self._known.get(w.ref, ("", None))
        if copy is not None and seen == identity and copy.directory == directory:
            return copy
        look = await _look(Directory(source), await self._base(model))
        if look.flaw is not None:
            raise BadRequest(f"Fileset {fileset.ref}: {look.flaw.message}.")
        if directory is None:
            by_reference = isinstance(where, LocalWeights) and where.directory is not None
            make = functools.partial(self.files.make, link=not by_reference)
            directory = await in_thread(make, w.model, w.name, identity, source, WEIGHTS_DIR)
        copy = Copy(directory=directory, rank=look.rank)
        self._known[w.ref] = (identity, copy)
        return copy

    async def _references(self, w: Wanted) -> tuple[Entity, Entity]:
        """Its model and its fileset."""
        row = await self._store.find("adapters", *w.ref)
        model = await self._store.find("models", *w.model)
        if row is None or model is None:
            raise WeightsMissing(f"Adapter {w.ref} or its model {w.model} does not exist.")
        where = parse_ref(row.wish.fileset, row.workspace, "fileset")
        fileset = await self._store.find("filesets", *where)
        if fileset is None:
            raise WeightsMissing(f"Fileset '{where}' does not exist.")
        return model, fileset

    async def _source(self, where: HubWeights | LocalWeights, on_progress: Callable[[WeightsProgress], None]) -> Path:
        """The directory of this machine that has the files; they are fetched where they are not."""
        if isinstance(where, LocalWeights):
            return local_directory(where, self._files_root)
        repo = repo_of(where)
        found = await in_thread(self._weights.present, repo)
        if found is None:
            token = await self._secret(where.token_secret) if where.token_secret else None
            found = await self._weights.fetch(repo, token, on_progress)
        return Path(found.path)

    async def _base(self, model: Entity) -> Base:
        return Base(name=model.ref, spec=spec_of(model), repo_id=await self._repo_id(model))

    async def _repo_id(self, model: Entity) -> str | None:
        where = ref_in(model.wish.fileset, model.workspace)
        if where is None:
            return None
        fileset = await self._store.find("filesets", *where)
        storage = fileset.wish.storage if fileset else None
        return storage.repo_id if isinstance(storage, HuggingFaceStorage) else None


async def _look(source: Source, base: Base) -> Look:
    names = set(await source.names())
    config = await _config(source) if CONFIG in names else {}
    flaw = find_flaw(names, config, None, base)
    if flaw is None and SAFETENSORS in names:
        flaw = find_flaw(names, config, await read_tensors(source, [SAFETENSORS]), base)
    return Look(rank=rank_of(config), flaw=flaw)


async def _config(source: Source) -> Json:
    try:
        content = json.loads(await source.read(CONFIG, CONFIG_BYTES))
    except (ValueError, RecursionError) as error:
        raise BadRequest(f"{CONFIG} of {source} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise BadRequest(f"{CONFIG} of {source} is not a JSON object.")
    return content
