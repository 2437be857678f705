"""What engines would load as a chat template, and what they would not."""

from __future__ import annotations

import time

import pytest

from nimhost.errors import BadRequest
from nimhost.models.chat_template import check_chat_template
from tests.spec_deployments import PLAIN_TEMPLATE, TEMPLATE
from tests.tiny import CHAT_TEMPLATE


@pytest.mark.parametrize(
    "template",
    [
        TEMPLATE,
        PLAIN_TEMPLATE,
        CHAT_TEMPLATE,
        "{% for m in messages %}{% if loop.index > 3 %}{% break %}{% endif %}{% continue %}{% endfor %}",
        "{% generation %}{{ messages[0].content }}{% endgeneration %}",
        "{{ raise_exception('no') }}{{ strftime_now('%d %b %Y') }}{{ tools | tojson(indent=2) }}",
        "{%- macro render(x) -%}{{ x | trim }}{%- endmacro -%}{{ render(bos_token) }}",
        "{% set ns = namespace(found=false) %}{% set ns.found = true %}",
        "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}",
    ],
)
def test_templates_that_engines_load_are_accepted(template: str) -> None:
    check_chat_template(template, "f")


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}", "line 1: Unexpected end of template"),
        ("a\n{{ }}", "line 2: "),
        ("{% frobnicate %}", "Encountered unknown tag 'frobnicate'"),
        ("{% generation %}", "Unexpected end"),
        ("{{ x | no_such_filter }}", "No filter named 'no_such_filter'"),
        ("{% break %}", "'break' outside loop"),
        ("{% block a %}{% endblock %}{% block a %}{% endblock %}", "block 'a' defined twice"),
        ("{{" * 3000, "recursion"),
    ],
)
def test_templates_that_do_not_compile_are_refused_with_the_place(template: str, says: str) -> None:
    with pytest.raises(BadRequest) as refused:
        check_chat_template(template, "model_spec.chat_template")
    assert refused.value.message.startswith("model_spec.chat_template is not a chat template: ")
    assert says in refused.value.message


@pytest.mark.parametrize(
    "template",
    [
        "{{ 9**(9**9) }}",
        "{{ 'a' * 10**9 }}",
        "{{ 'a' | center(10**9) }}",
        "{% if 9**(9**9) %}{% endif %}",
        "{% set x = 'a' * 10**9 %}",
    ],
)
def test_nothing_in_a_template_is_computed(template: str) -> None:
    began = time.monotonic()
    check_chat_template(template, "f")
    assert time.monotonic() - began < 2
