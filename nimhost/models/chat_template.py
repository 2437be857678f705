"""Whether a chat template is one that engines can load: parsed and compiled as `transformers` does, never rendered.

See `_compile_jinja_template` in transformers' chat_template_utils.py: Jinja2's immutable sandbox, `trim_blocks`,
`lstrip_blocks`, loop controls, and a `generation` block. Constant expressions are not folded: whoever sends
`{{ 9**(9**9) }}` must not make the daemon compute it.
"""

from __future__ import annotations

from jinja2 import TemplateError, TemplateSyntaxError, nodes, pass_context
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nimhost.errors import BadRequest


def check_chat_template(template: str, field: str) -> None:
    """Raises BadRequest, with `field` and the line at fault, for a template that does not compile."""
    try:
        _ENVIRONMENT.from_string(template)
    except TemplateSyntaxError as error:
        raise _refusal(field, f"line {error.lineno}: {error.message}") from None
    except SyntaxError as error:  # what the template became, as Python: `break` outside of a loop, and the like
        raise _refusal(field, str(error.msg)) from None
    except (TemplateError, RecursionError, MemoryError, ValueError) as error:
        raise _refusal(field, str(error) or type(error).__name__) from None


def _refusal(field: str, why: str) -> BadRequest:
    return BadRequest(
        f"{field} is not a chat template: {why}",
        "It is a Jinja2 template: https://huggingface.co/docs/transformers/en/chat_templating_writing",
    )


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}`: what the assistant said. It only has to be there."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own way)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


@pass_context
def _as_it_is(context: Context, value: object) -> object:
    """A `finalize` that wants the context keeps the compiler from evaluating what is printed."""
    return value


_ENVIRONMENT = ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, "jinja2.ext.loopcontrols"],
    optimized=False,
    finalize=_as_it_is,
    cache_size=0,
)
