"""Metrics of several engines as one text, pure: each sample says whose it is, each family is described once.

Prometheus' text format, read by the line. What cannot be read is left out: one bad line would make a scraper drop all.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

MOST_SAMPLES = 20_000
"""Of one engine."""
OWN = "nimhost_"
"""Names that begin so are ours."""
_LABEL = r'[a-zA-Z_][a-zA-Z0-9_]*[ \t]*=[ \t]*"(?:[^"\\]|\\[\\"n])*"'
_LABELS = rf"[ \t]*(?:{_LABEL}[ \t]*(?:,[ \t]*{_LABEL}[ \t]*)*(?:,[ \t]*)?)?"
"""Blanks are matched in one place only: with two of them a long line takes as long as its length squared."""
_NUMBER = r"[-+]?(?:(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?|Inf|NaN)"
_SAMPLE = re.compile(
    rf"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{{({_LABELS})\}})?[ \t]+({_NUMBER})(?:[ \t]+-?\d+)?[ \t]*", re.ASCII
)
_ONE = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)[ \t]*=[ \t]*("(?:[^"\\]|\\.)*")')
_ABOUT = re.compile(r"# (HELP|TYPE) ([a-zA-Z_:][a-zA-Z0-9_:]*)(?: (.*))?")
_TYPES = frozenset({"counter", "gauge", "histogram", "summary", "untyped"})

Labels = tuple[tuple[str, str], ...]


class _Family:
    def __init__(self) -> None:
        self.help = self.type = ""
        self.samples: list[str] = []


def merge(texts: Iterable[tuple[Labels, str]]) -> str:
    """`texts`: what each engine said, and the labels that its samples get."""
    families: dict[str, _Family] = {}
    for labels, text in texts:
        _read(families, labels, text)
    return "".join(_render(name, family) for name, family in families.items() if family.samples)


def _read(families: dict[str, _Family], labels: Labels, text: str) -> None:
    ours = {name: f'"{_escape(value)}"' for name, value in labels}
    current, count = "", 0
    for line in text.replace("\r\n", "\n").split("\n"):
        if about := _ABOUT.fullmatch(line):
            what, current, said = about[1], about[2], about[3] or ""
            _describe(families, what, current, said)
        elif (sample := _SAMPLE.fullmatch(line)) and count < MOST_SAMPLES and not sample[1].startswith(OWN):
            own = [
                (f"exported_{name}" if name in ours else name, value) for name, value in _ONE.findall(sample[2] or "")
            ]
            both = ours | dict(own)
            if len(both) == len(ours) + len(own):  # else one label is there twice
                count += 1
                said = ",".join(f"{name}={value}" for name, value in both.items())
                family = _family_of(families, sample[1], current)
                family.samples.append(f"{sample[1]}{{{said}}} {sample[3]}\n")


def _describe(families: dict[str, _Family], what: str, name: str, said: str) -> None:
    """The first to describe a family is believed."""
    family = families.setdefault(name, _Family())
    if what == "HELP":
        family.help = family.help or said
    elif said in _TYPES:
        family.type = family.type or said


def _family_of(families: dict[str, _Family], sample: str, current: str) -> _Family:
    if sample.startswith(current) and sample[len(current) :] in ("", "_bucket", "_sum", "_count", "_total", "_created"):
        return families.setdefault(current or sample, _Family())
    return families.setdefault(sample, _Family())


def _render(name: str, family: _Family) -> str:
    help = f"# HELP {name} {family.help}\n" if family.help else ""
    return f"{help}# TYPE {name} {family.type or 'untyped'}\n{''.join(family.samples)}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
