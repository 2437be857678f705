"""The directories that NIMs look for adapters in (`NIM_PEFT_SOURCE`): filled, emptied, and watched until they noticed.

A NIM loads what appears and forgets what is gone, each time it looks (`NIM_PEFT_REFRESH_INTERVAL`); it does not notice
that something changed under its name. So another version is put there when no NIM serves the former one any more.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping, Sequence

from nimhost.deployments.adapters import LOADING, Copy, Engine, Lacking, Taker, Wanted, changes_for_nims, loaded_in
from nimhost.deployments.probe import Prober
from nimhost.engines.nim import PEFT_REFRESH_S
from nimhost.host.adapter_files import AdapterFiles
from nimhost.host.threads import in_thread
from nimhost.refs import Ref

FORGETS_S = 3.0 * PEFT_REFRESH_S
"""After this time a NIM that still lists what is gone is not waited for any more."""


class NimDirectories:
    def __init__(self, files: AdapterFiles, prober: Prober) -> None:
        self._files = files
        self._prober = prober
        self._hidden: dict[tuple[Ref, str], float] = {}
        """Model and adapter -> when it was first seen to be gone for NIMs that still serve it."""
        self._began_s = time.monotonic()
        self._awaited: set[Ref] = set()
        """Models whose NIMs have something to notice."""

    async def fill(
        self, wanted: Iterable[Wanted], copies: Mapping[Ref, Copy | Lacking], takers: Iterable[Taker],
        engines: Sequence[Engine], silent: Collection[Ref],
    ) -> bool:  # fmt: skip
        """Puts adapters where NIMs look, takes others away; whether a NIM has still to notice something.

        `silent`: models of NIMs of which it is not known what they serve: a former daemon may have taken something
        away that they have not forgotten. One that only starts is not waited for for ever. Raises DiskFull, HostError.
        """
        nims = [taker for taker in takers if taker.kind == "nim"]
        shown = await in_thread(self._files.shown) if nims or self._awaited or self._hidden else {}
        for model in {taker.model for taker in nims} | shown.keys():
            mine = {w.name: copies.get(w.ref) or Lacking(message=LOADING) for w in wanted if w.model == model}
            ranks = [taker.max_rank for taker in nims if taker.model == model and taker.max_rank]
            running = [engine for engine in engines if engine.kind == "nim" and engine.model == model]
            served = await self._served(model, running)
            there = shown.get(model, {})
            listed = self._still_listed(model, served, there)
            hide, show = changes_for_nims(mine, there, listed, min(ranks, default=None))
            if unknown := model in silent and time.monotonic() - self._began_s < FORGETS_S:
                show = ()
            await self._change(model, hide, show)
            names = (there.keys() - set(hide)) | {name for name, _ in show}
            noticed = not (hide or listed or unknown) and all(names <= found for found in served)
            (self._awaited.discard if noticed else self._awaited.add)(model)
        return bool(self._awaited)

    async def _served(self, model: Ref, running: Sequence[Engine]) -> list[set[str]]:
        """The adapters of each NIM, asked anew while something is to be noticed."""
        if model not in self._awaited:
            return [set(engine.loaded) for engine in running]
        for engine in running:
            await self._prober.relist(engine.container)
        return [set(loaded_in(self._prober.health(engine.container))) for engine in running]

    def _still_listed(self, model: Ref, served: Sequence[set[str]], there: Mapping[str, str]) -> set[str]:
        """What NIMs serve and do not see any more, whoever took it away: this daemon, or one that was killed then."""
        now_s = time.monotonic()
        stale = {name for names in served for name in names if name not in there}
        for key in [key for key in self._hidden if key[0] == model and key[1] not in stale]:
            del self._hidden[key]
        return {name for name in stale if now_s - self._hidden.setdefault((model, name), now_s) <= FORGETS_S}

    async def _change(self, model: Ref, hide: Iterable[str], show: Iterable[tuple[str, str]]) -> None:
        for name in hide:
            await in_thread(self._files.hide, model, name)
        for name, directory in show:
            await in_thread(self._files.show, model, name, directory)
