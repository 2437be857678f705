"""Bodies of requests -> wishes. Pure. Every wrong field is named in the 422 form of the wire, up to `MOST_PROBLEMS`."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import msgspec
from msgspec import NODEFAULT, Struct
from msgspec.structs import FieldInfo
from msgspec.structs import fields as struct_fields

from nimhost.errors import InvalidRequest, Problem

Json = dict[str, Any]
Loc = tuple[str | int, ...]
SENSITIVE = frozenset({"value", "api_key", "token"})
"""Fields whose content no error repeats."""
MOST_PROBLEMS = 50
"""Of one body: it may have 400,000 fields that nobody knows."""
SHOWN_LENGTH = 100
"""Of a field's name."""
MAX_INTEGER = 2**53 - 1
_STEP = re.compile(r"\.([^.\[]+)|\[(\d+)\]|(\[\.\.\.\])")


def parse_json(data: bytes) -> Json:
    """The JSON object in a body. Raises InvalidRequest."""
    if not data:
        raise _refuse([Problem(("body",), "Field required", "missing")])
    try:
        found = msgspec.json.decode(data)
    except UnicodeDecodeError as e:
        raise _refuse([_not_json(e.start, "not UTF-8")]) from e
    except RecursionError as e:
        raise _refuse([_not_json(0, "nested too deeply")]) from e
    except msgspec.DecodeError as e:
        position = re.search(r"byte (\d+)", str(e))
        raise _refuse([_not_json(int(position[1]) if position else len(data), str(e))]) from e
    if not isinstance(found, dict):
        raise _refuse([Problem(("body",), "Input should be an object", "model_attributes_type", found)])
    _refuse_repeated_keys(data)
    return found


def _refuse_repeated_keys(data: bytes) -> None:
    """Readers of JSON differ in which of two equal keys they take. Raises InvalidRequest, naming the key."""

    def look(pairs: list[tuple[str, object]]) -> None:
        seen = set()
        for key, _ in pairs:
            if key in seen:
                raise _refuse([Problem(("body", key[:SHOWN_LENGTH]), "The field is there twice", "json_invalid")])
            seen.add(key)

    try:
        json.loads(data, object_pairs_hook=look, parse_int=len, parse_float=len)
    except RecursionError as e:
        raise _refuse([_not_json(0, "nested too deeply")]) from e


def read_fields(
    fields: Iterable[FieldInfo], raw: Mapping[str, object], *, partial: bool = False, silent: bool = False
) -> Json:
    """The values of `raw`, each of its field's type.

    `partial`: none is required, and null means the default. `silent`: the problems do not repeat what was sent.

    Raises InvalidRequest with the problems: unknown, missing and wrong fields.
    """
    known = {f.encode_name: f for f in fields}
    values: Json = {}
    problems: list[Problem] = []
    for key, value in raw.items():
        if len(problems) >= MOST_PROBLEMS:
            break
        if key not in known:
            problems.append(_unknown(key[:SHOWN_LENGTH], value, known))
        elif partial and value is None:
            values |= _cleared(known[key])
        else:
            try:
                values[key] = msgspec.convert(value, known[key].type)
                problems += _too_large(values[key], ("body", key))
            except msgspec.ValidationError as e:
                problems.append(explain(str(e), known[key].type, value, ("body", key)))
            except RecursionError:
                problems.append(Problem(("body", key), "Nested too deeply", "recursion"))
    if not partial:
        problems += [_missing(("body", f.name), raw) for f in known.values() if f.required and f.name not in raw]
    for problem in problems if silent else ():
        problem["input"] = None
    if problems:
        raise _refuse(problems)
    return values


def read_struct(cls: type[Struct], raw: Mapping[str, object]) -> Any:
    return cls(**read_fields(struct_fields(cls), raw))


def explain(message: str, kind: Any, value: object, loc: Loc) -> Problem:
    """One of msgspec's sentences about `value` as a problem of the wire, with the place inside `loc`."""
    text, _, place = message.partition(" - at `")
    steps = _steps(place.removesuffix("`"), kind, value)
    here, inner = _follow(value, steps), _type_at(kind, steps)
    name = re.search(r"`([^`]*)`", text)
    if text.startswith("Object missing required field") and name:
        return _missing((*loc, *steps, name[1]), here)
    if text.startswith("Object contains unknown field") and name:
        short = name[1][:SHOWN_LENGTH]
        problem = _unknown(short, _follow(here, (name[1],)), _names_in(inner))
        problem["loc"] = [*loc, *steps, short]
        return problem
    choices = _choices(inner)
    if text.startswith("Invalid enum value") and choices:
        return Problem((*loc, *steps), f"Input should be {_listed(choices)}", "literal_error", here)
    if bound := re.fullmatch(r"Expected `(?:int|float)` (>=|<=) (\S+)", text):
        way = "greater" if bound[1] == ">=" else "less"
        return Problem(
            (*loc, *steps), f"Input should be {way} than or equal to {bound[2]}", f"{way}_than_equal", _shown(loc, here)
        )
    if bound := re.fullmatch(r"Expected `str` of length <= (\d+)", text):
        words = f"String should have at most {bound[1]} characters"
        return Problem((*loc, *steps), words, "string_too_long", _shown((*loc, *steps), here))
    return Problem((*loc, *steps), text, "value_error", _shown((*loc, *steps), here))


def _steps(place: str, kind: Any, value: object) -> Loc:
    """A place as msgspec writes it, in steps. Which member of an object with free keys is wrong it does not tell."""
    steps: Loc = ()
    for name, index, member in _STEP.findall(place):
        step = name or (_wrong_member(_follow(value, steps), _type_at(kind, steps)) if member else int(index))
        steps = (*steps, step)
    return steps


def _wrong_member(members: object, kind: Any) -> str:
    inner = _type_at(kind, ("",))
    for key, value in members.items() if isinstance(members, dict) else ():
        try:
            msgspec.convert(value, inner)
        except msgspec.ValidationError:
            return str(key)
    return "..."


def _refuse(problems: list[Problem]) -> InvalidRequest:
    first = problems[0]
    where = ".".join(str(part) for part in first["loc"] if part != "body")  # type: ignore[attr-defined]
    return InvalidRequest(
        f"{where}: {first['msg']}" if where else str(first["msg"]), problems=tuple(problems[:MOST_PROBLEMS])
    )


def _not_json(position: int, reason: str) -> Problem:
    problem = Problem(("body", position), "JSON decode error", "json_invalid", {})
    problem["ctx"] = {"error": reason}
    return problem


def _missing(loc: Loc, here: object) -> Problem:
    return Problem(loc, "Field required", "missing", _without_secrets(here))


def _unknown(key: str, value: object, known: Iterable[str]) -> Problem:
    near = difflib.get_close_matches(key, list(known), n=1)
    advice = f"; did you mean '{near[0]}'?" if near else f"; known are {', '.join(sorted(known))}"
    return Problem(("body", key), f"Unknown field{advice}", "extra_forbidden", _shown((key, *near), value))


def _cleared(field: FieldInfo) -> Json:
    """What a null in an update means: null where that is allowed, else the default, else nothing at all."""
    if NoneType in _members(field.type):
        return {field.name: None}
    if field.default is not NODEFAULT:
        return {field.name: field.default}
    return {} if field.default_factory is NODEFAULT else {field.name: field.default_factory()}


def _too_large(value: object, loc: Loc) -> list[Problem]:
    """Integers that not every reader of JSON keeps exactly; typed ones only, free-form places stay free."""
    match value:
        case int() if abs(value) > MAX_INTEGER:
            bound = f"Input should be less than or equal to {MAX_INTEGER}"
            return [Problem(loc, bound, "less_than_equal", _shortened(value))]
        case list():
            return [problem for place, item in enumerate(value) for problem in _too_large(item, (*loc, place))]
        case Struct():
            parts = [(f.encode_name, getattr(value, f.name)) for f in struct_fields(type(value))]
            return [problem for name, part in parts for problem in _too_large(part, (*loc, name))]
    return []


def _shortened(number: int) -> str:
    return str(number) if abs(number) < 2**64 else f"an integer of {number.bit_length()} bits"


def _without_secrets(value: object) -> object:
    if isinstance(value, dict):
        return {k: v for k, v in value.items() if k not in SENSITIVE}
    return value


def _shown(loc: Loc, value: object) -> object:
    return None if SENSITIVE & set(map(str, loc)) else _without_secrets(value)


def _follow(value: object, steps: Loc) -> object:
    for step in steps:
        try:
            value = value[step]  # type: ignore[index]
        except (KeyError, IndexError, TypeError):
            return None
    return value


# --- types ---------------------------------------------------------------------------------------------------------


def _members(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _structs(kind: Any) -> list[type[Struct]]:
    return [t for t in _members(kind) if isinstance(t, type) and issubclass(t, Struct)]


def _type_at(kind: Any, steps: Loc) -> Any:
    for step in steps:
        if isinstance(step, int):
            kind = next((get_args(t)[0] for t in _members(kind) if get_origin(t) is list), None)
        else:
            fields = [f.type for t in _structs(kind) for f in struct_fields(t) if f.name == step]
            kind = next(iter(fields or [get_args(t)[1] for t in _members(kind) if get_origin(t) is dict]), None)
    return kind


def _names_in(kind: Any) -> list[str]:
    return [f.encode_name for struct in _structs(kind) for f in struct_fields(struct)]


def _choices(kind: Any) -> list[str]:
    return [str(choice) for t in _members(kind) if get_origin(t) is Literal for choice in get_args(t)]


def _listed(words: list[str]) -> str:
    quoted = [f"'{word}'" for word in words]
    return f"{', '.join(quoted[:-1])} or {quoted[-1]}" if len(quoted) > 1 else quoted[0]
