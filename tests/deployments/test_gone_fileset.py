"""An adapter keeps nobody from deleting its files, of whatever workspace, and says that they are gone."""

from __future__ import annotations

from pathlib import Path

from tests.world import World

API = "/apis/models/v2/workspaces"
FILESETS = "/apis/files/v2/workspaces/default/filesets"


async def test_an_adapter_says_that_its_fileset_is_gone(tmp_path: Path) -> None:
    async with World(tmp_path) as world:
        await world.post("/apis/entities/v2/workspaces", {"name": "other"})
        await world.http.post(FILESETS, json={"name": "files"})
        await world.http.put(f"{FILESETS}/files/-/adapter_config.json", content=b"{}")
        await world.post(f"{API}/default/models", {"name": "base"})
        body = {"fileset": "default/files", "finetuning_type": "prompt_tuning", "model": "default/base"}
        for workspace in ("default", "other"):
            await world.post(f"{API}/{workspace}/adapters", {"name": "ad", **body})
        assert (await world.http.delete(f"{FILESETS}/files")).status_code == 200
        for workspace in ("default", "other"):
            one = (await world.http.get(f"{API}/{workspace}/adapters/ad")).json()
            listed = (await world.http.get(f"{API}/{workspace}/adapters")).json()["data"][0]
            for said in (one["status_message"], listed["status_message"]):
                assert said.startswith("Fileset default/files does not exist any more: ")
                assert said.count("Fileset") == 1
