"""The commands and snippets of two pages of the reference platform, as blocks and as single steps."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
_FENCE = re.compile(r"^(#+ [^\n]*)$|^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    heading: str
    language: str
    text: str


def blocks(page: str, language: str) -> list[Block]:
    """The blocks in that language of `deploy-models` or `run-inference`, in the page's order."""
    found, heading = [], ""
    for title, tongue, text in _FENCE.findall((HERE / f"{page}.md").read_text()):
        if title:
            heading = title.lstrip("# ")
        elif tongue == language:
            found.append(Block(heading, tongue, text))
    return found


def commands(text: str) -> list[str]:
    """The single commands of a bash block, each with the comments before it. Bash itself says where one ends."""
    found, lines = [], []
    for line in text.splitlines():
        lines.append(line)
        command = "\n".join(lines)
        if any(is_code(line) for line in lines) and not line.endswith("\\") and _whole(command):
            found.append(command)
            lines = []
    assert not any(is_code(line) for line in lines), lines
    return found


def is_code(line: str) -> bool:
    return bool(line.strip()) and not line.lstrip().startswith("#")


def _whole(text: str) -> bool:
    return subprocess.run(["bash", "-n", "-c", text], capture_output=True, check=False).returncode == 0
