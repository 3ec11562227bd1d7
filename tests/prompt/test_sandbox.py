"""Hostile chat templates: each ends soon, in bounded memory, with an error of ours."""

from __future__ import annotations

import time

import pytest

from qvl.runtime.errors import PromptError
from qvl.runtime.prompt.sandbox import MAX_TEMPLATE, ChatTemplateError, CompiledTemplate

DOUBLING = (
    "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}{% set ns.x = EXPRESSION %}{% endfor %}"
)
HOSTILE = {
    "loops within loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a loop over lists": "{% for i in range(99999) if range(99999)|list %}{% endfor %}",
    "doubling by ~": DOUBLING.replace("EXPRESSION", "ns.x ~ ns.x"),
    "doubling by +": DOUBLING.replace("EXPRESSION", "ns.x + ns.x"),
    "doubling by join": DOUBLING.replace("EXPRESSION", "[ns.x, ns.x]|join"),
    "replacing": DOUBLING.replace("EXPRESSION", "ns.x.replace('a', ns.x)"),
    "replacing by filter": DOUBLING.replace("EXPRESSION", "ns.x|replace('a', ns.x)"),
    "doubling by a block": "{% set ns = namespace(x='aaaaaaaaaa') %}{% for i in range(60) %}"
    "{% set y %}{{ ns.x }}{{ ns.x }}{% endset %}{% set ns.x = y %}{% endfor %}",
    "a macro that calls itself": "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "a tree of macros": "{% macro f(n) %}"
    "{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(100) }}",
    "a long repeat": "{{ 'a' * 999999999999 }}",
    "a long list": "{{ [1] * 999999999999 }}",
    "a power": "{{ 2 ** 99999999 }}",
    "padding": "{{ 'a'.center(99999999999) }}",
    "padding by filter": "{{ 'a'|center(99999999999) }}",
    "format": "{{ '%9999999999d' % 1 }}",
    "str.format": "{% set f = '{:99999999999}' %}{{ f.format(1) }}",
    "a long range": "{{ range(999999999)|list }}",
    "reaching for Python": "{{ ''.__class__.__mro__ }}",
    "another file": "{% include 'x' %}",
    "nesting": "{{" + "(" * 5000 + "1" + ")" * 5000 + "}}",
    "statements nested": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "length": "x" * (MAX_TEMPLATE + 1),
    "no template": "{% for %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_ends_soon(name: str) -> None:
    started = time.process_time()
    with pytest.raises(ChatTemplateError):
        CompiledTemplate(HOSTILE[name]).render(messages=[])
    assert time.process_time() - started < 3


def test_a_template_renders_twice() -> None:
    template = CompiledTemplate("{% for i in range(1000) %}x{% endfor %}{{ name ~ '!' }}")
    assert template.render(name="a") == "x" * 1000 + "a!"
    for _ in range(300):  # the count begins anew each time
        assert template.render(name="b").endswith("b!")


def test_what_the_template_itself_refuses() -> None:
    with pytest.raises(PromptError, match="no pictures"):
        CompiledTemplate("{{ raise_exception('no pictures') }}").render()


def test_generation_blocks_are_rendered() -> None:
    assert CompiledTemplate("a{% generation %}b{{ x }}{% endgeneration %}").render(x=1) == "ab1"
