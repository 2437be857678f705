"""The template of an authentication header: one variable, one header, nothing else."""

from __future__ import annotations

import pytest

from nimhost.auth_header import check_auth_header, render_auth_header
from nimhost.errors import InvalidRequest, UpstreamError


@pytest.mark.parametrize(
    ("template", "header"),
    [
        (None, ("Authorization", "Bearer k")),
        ("X-Api-Key: {{ auth_secret }}", ("X-Api-Key", "k")),
        ("X: a: {{auth_secret|upper}}", ("X", "a: K")),
    ],
)
def test_a_template_renders_to_a_header(template: str | None, header: tuple[str, str]) -> None:
    if template:
        check_auth_header(template)
    assert render_auth_header(template, "k\n") == header


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("X-Api-Key: nothing", "exactly one Jinja2 variable named 'auth_secret' (found: none)"),
        ("X: {{ a }} {{ auth_secret }}", "(found: a, auth_secret)"),
        ("X: {{ auth_secret }}{{ auth_secret }}", "(found: auth_secret, 2 times)"),
        ("{{ auth_secret }}", "must render to '<Header-Name>: <Header-Value>'"),
        (": {{ auth_secret }}", "must render to '<Header-Name>: <Header-Value>'"),
        ("A B: {{ auth_secret }}", "must render to '<Header-Name>: <Header-Value>'"),
        ("A: b\r\nC: {{ auth_secret }}", "must render to '<Header-Name>: <Header-Value>'"),
        ("X: {{ auth_secret", "Invalid Jinja2 template"),
        ("X: {{ auth_secret|nope }}", "Invalid Jinja2 template"),
        ("{% for i in [1] %}X: {{ auth_secret }}{% endfor %}", "Invalid Jinja2 template"),
        ("X: {{ auth_secret.__class__ }}", "Invalid Jinja2 template"),
        ("X: {{ auth_secret * 1000 }}", "Invalid Jinja2 template"),
        ("X: {{ auth_secret|center(10000000000) }}", "there is no filter 'center' here, only default, lower, string"),
        ("X: {{ '%10000000000s'|format(auth_secret) }}", "there is no filter 'format' here"),
        ("X: {{ auth_secret|replace('e', 'ee')|replace('e', 'ee') }}", "there is no filter 'replace' here"),
        ("X: {{ auth_secret|xmlattr }}", "there is no filter 'xmlattr' here"),
        ("X: {{ auth_secret|upper(1) }}", "Invalid Jinja2 template"),
        ("X: {{ auth_secret" + "|upper" * 300 + " }}", "Invalid Jinja2 template"),
        ("X: {{ " + "(" * 5000 + "auth_secret" + ")" * 5000 + " }}", "Invalid Jinja2 template"),
    ],
)
def test_what_is_not_such_a_template_is_refused(template: str, text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_auth_header(template)
    assert caught.value.problems[0]["loc"] == ["body", "auth_header_format"]
    assert text in str(caught.value)


@pytest.mark.fault(29)
@pytest.mark.parametrize("secret", ["a\nX-Evil: 1", "a\r\nb", "", "\n"])
def test_a_secret_that_would_break_the_header_is_an_error_that_does_not_show_it(secret: str) -> None:
    with pytest.raises(UpstreamError) as caught:
        render_auth_header("X-Api-Key: {{ auth_secret }}", secret)
    assert "Evil" not in str(caught.value)
