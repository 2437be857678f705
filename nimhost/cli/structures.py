"""What JSON can hold, as YAML out, and as JSON or YAML in: the reference's commands take both."""

from __future__ import annotations

import json
import math
from typing import Any


def to_yaml(value: Any) -> str:
    import yaml  # here: it is seldom needed

    plain = json.loads(json.dumps(value))  # without subclasses of dict
    text: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, default_flow_style=False, width=math.inf)
    return text.removesuffix("\n").removesuffix("\n...")


def read_structure(text: str) -> Any:
    """What the text says: any value as JSON, an object or a list as YAML too. Raises ValueError, with the reason."""
    try:
        return json.loads(text, parse_constant=_refuse)
    except _NoNumber:
        raise
    except ValueError as error:
        why = str(error)
    try:
        found = _read_yaml(text)
    except ValueError as error:
        # Where it begins as JSON does, what is wrong with it as JSON says more.
        why = why if text.lstrip().startswith(("{", "[")) else str(error)
    else:
        if isinstance(found, dict | list):
            return found
    raise ValueError(f"this is neither JSON nor YAML: {why}")


def _read_yaml(text: str) -> Any:
    """With times as text and all keys as text, as JSON has it. Raises ValueError."""
    import yaml

    try:
        return json.loads(json.dumps(yaml.safe_load(text), default=str, allow_nan=False))
    except yaml.MarkedYAMLError as error:
        at = error.problem_mark
        raise ValueError(f"{error.problem}: line {at.line + 1}, column {at.column + 1}" if at else str(error)) from None
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(str(error)) from None


class _NoNumber(ValueError):
    pass


def _refuse(word: str) -> None:
    raise _NoNumber(f"this is neither JSON nor YAML: there is no {word}")
