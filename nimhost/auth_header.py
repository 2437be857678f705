"""`auth_header_format`: a Jinja2 template that makes an upstream's authentication header out of a secret.

Pure, and sandboxed twice: nothing but text, the variable and filters that leave a text about as long as it was may
stand in it, and it is rendered in Jinja2's sandbox. There is no way to loop, to compute or to reach an attribute.
"""

from __future__ import annotations

import functools
import re

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nimhost.errors import InvalidRequest, UpstreamError

DEFAULT_FORMAT = "Authorization: Bearer {{ auth_secret }}"
VARIABLE = "auth_secret"
_ALLOWED = (nodes.Template, nodes.Output, nodes.TemplateData, nodes.Name, nodes.Filter, nodes.Const)
FILTERS = ("default", "lower", "string", "trim", "upper", "urlencode")
MOST_FILTERS = 5
"""Jinja2 takes the cube of their number: 300 of them are a minute."""
_ONE_VARIABLE = f"auth_header_format must contain exactly one Jinja2 variable named '{VARIABLE}'"
NOT_SETTABLE = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "keep-alive", "proxy-connection",
     "proxy-authenticate", "proxy-authorization", "te", "trailer", "trailers", "upgrade", "expect", "x-nimhost-hop"}
)  # fmt: skip
"""Names (in lower case) of what a request is framed and led with: who sets them can make two requests out of one."""
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_ENVIRONMENT = ImmutableSandboxedEnvironment(autoescape=False)


def check_auth_header(template: str) -> None:
    """Raises InvalidRequest, naming the field, unless exactly one `auth_secret` renders to `Name: value`."""
    problem = _problem(template)
    if problem:
        raise InvalidRequest.field(f"Value error, {problem}", "auth_header_format", input=template)


def render_auth_header(template: str | None, secret: str) -> tuple[str, str]:
    """Name and value of the header. A trailing newline of the secret is left out.

    Raises UpstreamError when the secret cannot stand in a header (a line break inside).
    """
    text = _compile(template or DEFAULT_FORMAT).render(auth_secret=secret.rstrip("\r\n"))
    name, _, value = text.partition(": ")
    if "\r" in text or "\n" in text or not _HEADER_NAME.fullmatch(name) or not value:
        raise UpstreamError(
            "The provider's secret cannot be put into a header: it is empty or has a line break inside.",
            hint="Set it again as one line: nimhost secrets update NAME --from-file -",
        )
    return name, value


@functools.lru_cache(maxsize=256)
def _compile(template: str) -> Template:
    return _ENVIRONMENT.from_string(template)


def _problem(template: str) -> str | None:
    try:
        tree = _ENVIRONMENT.parse(template)
        filters = [node.name for node in tree.find_all(nodes.Filter)]
        if strange := [node for node in _walk(tree) if not isinstance(node, _ALLOWED)]:
            return f"Invalid Jinja2 template: {type(strange[0]).__name__} is not allowed here"
        if other := set(filters).difference(FILTERS):
            return f"Invalid Jinja2 template: there is no filter '{min(other)}' here, only {', '.join(FILTERS)}"
        if len(filters) > MOST_FILTERS:
            return f"Invalid Jinja2 template: more than {MOST_FILTERS} filters"
        names = meta.find_undeclared_variables(tree)
        uses = [node for node in tree.find_all(nodes.Name) if node.name == VARIABLE]
        if names != {VARIABLE} or len(uses) != 1:
            found = ", ".join(sorted(names)) or "none"
            times = f", {len(uses)} times" if names == {VARIABLE} else ""
            return f"{_ONE_VARIABLE} (found: {found}{times})"
        text = _compile(template).render({VARIABLE: "secret"})
    except (TemplateError, TypeError, RecursionError) as e:
        return f"Invalid Jinja2 template: {e}"
    name, _, value = text.partition(": ")
    if not _HEADER_NAME.fullmatch(name) or not value.strip() or "\n" in text or "\r" in text:
        return "auth_header_format must render to '<Header-Name>: <Header-Value>'"
    if name.lower() in NOT_SETTABLE:
        return f"auth_header_format must not set the header {name}: nimhost sets it itself"
    return None


def _walk(node: nodes.Node) -> list[nodes.Node]:
    return [node, *(inner for child in node.iter_child_nodes() for inner in _walk(child))]
