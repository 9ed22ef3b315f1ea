"""Jinja templates get contents in the form that they take, however they are written."""

from __future__ import annotations

import pytest

from dpn_rt.errors import RequestError
from dpn_rt.prompts.messages import Marker, Turn
from dpn_rt.prompts.template import ChatOptions, JinjaTemplate

TURNS = [Turn("user", ("a", Marker.IMAGE, "b", "c")), Turn("assistant", ("d",)), Turn("user", ("e",))]
STRINGS = {
    "subscript": "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}",
    "attribute": "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    "added": "{% for m in messages %}{{ '[' + m['role'] + ']' + m['content'] }}{% endfor %}",
    "trimmed": "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}",
    "method": "{% for m in messages %}[{{ m.role }}]{{ m.content.strip() }}{% endfor %}",
    "mentions type": "{# 'type' \"type\" #}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    "split": "{% for m in messages %}[{{ m.role }}]{{ m.content.split('</think>')[-1] }}{% endfor %}",
}
PARTS = {
    "subscript": "{% for m in messages %}[{{ m['role'] }}]{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endfor %}",
    "attribute": "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}"
    "{% if p.type == 'text' %}{{ p.text }}{% else %}<image>{% endif %}{% endfor %}{% endfor %}",
    "get": "{% for m in messages %}[{{ m.get('role') }}]{% for p in m.get('content') %}"
    "{{ p.get('text', '<image>') }}{% endfor %}{% endfor %}",
    "set": "{% for m in messages %}{% set c = m['content'] %}[{{ m.role }}]{% for p in c %}"
    "{{ p.text if p.text is defined else '<image>' }}{% endfor %}{% endfor %}",
    "indexed": "{% for m in messages %}[{{ m.role }}]{% for i in range(m.content | length) %}"
    "{{ m.content[i].text if 'text' in m.content[i] else '<image>' }}{% endfor %}{% endfor %}",
    "macro": "{% macro show(c) %}{% for p in c %}{{ p.text or '<image>' }}{% endfor %}{% endmacro %}"
    "{% for m in messages %}[{{ m.role }}]{{ show(m.content) }}{% endfor %}",
    "either": "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}{% endif %}{% endfor %}",
    "strings of assistants": "{% for m in messages %}[{{ m.role }}]{% if m.role == 'user' %}"
    "{% for p in m.content %}{{ p.text or '<image>' }}{% endfor %}{% else %}{{ m.content + '' }}{% endif %}"
    "{% endfor %}",
    "own image token": "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}"
    "{{ p.text or '<|picture|>' }}{% endfor %}{% endfor %}",
}


def render(source: str, turns: list[Turn] = TURNS, **options: bool) -> str:
    return JinjaTemplate(source, {"bos_token": "<s>"}, "<|picture|>").render(turns, "", ChatOptions(**options))


@pytest.mark.parametrize("source", STRINGS.values(), ids=STRINGS)
def test_strings(source: str) -> None:
    assert render(source) == "[user]a<image>bc[assistant]d[user]e"
    system = [Turn("system", ("s",)), *TURNS]
    assert render(source, system) == "[system]s[user]a<image>bc[assistant]d[user]e"


@pytest.mark.parametrize("source", PARTS.values(), ids=PARTS)
def test_lists_of_parts(source: str) -> None:
    assert render(source).replace("<|picture|>", "<image>") == "[user]a<image>bc[assistant]d[user]e"
    system = [Turn("system", ("s",)), *TURNS]
    assert render(source, system).startswith("[system]s[user]a<")


def test_images_of_strings_stand_first_where_they_stand_alone() -> None:
    assert render(STRINGS["attribute"], [Turn("user", ("a", Marker.IMAGE))]) == "[user]<image>\na"


def test_system_messages_as_strings_beside_lists() -> None:
    source = "{% if messages[0].role == 'system' %}{{ 'S:' + messages[0].content }}{% endif %}"
    source += PARTS["attribute"].replace("messages %}", "messages if m.role != 'system' %}")
    assert render(source, [Turn("system", ("s",)), *TURNS]) == "S:s[user]a<image>bc[assistant]d[user]e"


def test_special_tokens_are_variables() -> None:
    assert render("{{ bos_token }}" + PARTS["get"]) == "<s>[user]a<image>bc[assistant]d[user]e"


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("{{ 'Hello' }}", "leaves out what messages say"),
        ("", "leaves out what messages say"),
        ("{% for m in messages %}{{ m.content }}", "its line 1 is no valid Jinja"),
        ("{{ nothing.at.all }}", "do not suit"),
        ("{{ raise_exception('needs a tool') }}", "needs a tool"),
        ("{% for m in messages %}{{ m.content | nosuchfilter }}{% endfor %}", "do not suit|no valid Jinja"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out"),
    ],
)
def test_templates_that_cannot_be_used(source: str, named: str) -> None:
    with pytest.raises(RequestError, match=named):
        render(source)


def test_what_a_template_refuses() -> None:
    source = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    template = JinjaTemplate(source + PARTS["get"], {}, None)
    with pytest.raises(RequestError, match="do not suit the model's chat template: System role not supported$"):
        template.render([Turn("system", ("s",)), *TURNS], "", ChatOptions())
    assert template.render(TURNS, "", ChatOptions()) == "[user]a<image>bc[assistant]d[user]e"
