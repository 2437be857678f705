"""Run python blocks statement by statement: a program for the interpreter that has the official SDK.

Reads `{"blocks": [{"heading", "text"}], "repairs": {statement: another}}` from standard input, executes all of it in
one namespace, and prints a JSON object per statement: `heading`, `text`, `error` (empty when all is well), `out` (what
it printed, and what `response` is). A wait that gives False is an error. A repair is run after a statement that failed.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import sys
from typing import Any


def run(blocks: list[dict[str, str]], repairs: dict[str, str]) -> None:
    names: dict[str, Any] = {"__name__": "snippet"}
    for block in blocks:
        for statement in ast.parse(block["text"]).body:
            text, printed = ast.unparse(statement), io.StringIO()
            with contextlib.redirect_stdout(printed):
                error = attempt(statement, names)
                if error and text in repairs:
                    exec(repairs[text], names)
            out = f"{printed.getvalue()}{names.pop('response', '')}"
            print(json.dumps({"heading": block["heading"], "text": text, "error": error, "out": out}), flush=True)


def attempt(statement: ast.stmt, names: dict[str, Any]) -> str:
    """What went wrong, if anything did."""
    try:
        if isinstance(statement, ast.Expr):
            value = eval(compile(ast.Expression(statement.value), "<page>", "eval"), names)
            return "it returned False" if value is False else ""
        exec(compile(ast.Module([statement], []), "<page>", "exec"), names)
    except Exception as error:  # whatever a snippet raises is a result of ours
        return f"{type(error).__name__}: {error}"
    return ""


if __name__ == "__main__":
    given = json.load(sys.stdin)
    run(given["blocks"], given["repairs"])
