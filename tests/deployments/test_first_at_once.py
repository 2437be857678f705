"""Engines that share a directory or a file, and are the first to need it at the same moment."""

from __future__ import annotations

import asyncio
from pathlib import Path

from nimhost.deployments import execute
from nimhost.engines.spec import ContainerSpec, Mount, Probe

ROUNDS = 30
"""Each was lost more often than not."""


async def test_two_engines_may_be_the_first_to_need_a_directory(tmp_path: Path) -> None:
    for number in range(ROUNDS):
        spec = spec_with(mounts=(Mount(str(tmp_path / f"{number}"), "/opt/nim/.cache", read_only=False),))
        await asyncio.gather(*(asyncio.to_thread(execute._make_directories, spec) for _ in range(4)))
    found = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert found == {str(number): 0o777 for number in range(ROUNDS)}


async def test_two_engines_may_be_the_first_to_need_a_file(tmp_path: Path) -> None:
    for number in range(ROUNDS):
        spec = spec_with(files={"/template.jinja": f"template {number}"})
        made = await asyncio.gather(*(asyncio.to_thread(execute._write_files, spec, tmp_path) for _ in range(4)))
        assert {Path(each.mounts[0].source).read_text() for each in made} == {f"template {number}"}
    assert {path.name for path in tmp_path.glob("*/*")} == {"template.jinja"}


def spec_with(mounts: tuple[Mount, ...] = (), files: dict[str, str] | None = None) -> ContainerSpec:
    return ContainerSpec(image="some/image:1", probe=Probe("/health"), mounts=mounts, files=files or {})
