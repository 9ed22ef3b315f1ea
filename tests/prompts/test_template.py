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
    "OpenAI's parts": "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}"
    "{% if p.type == 'image_url' %}<image>{% elif p.type == 'text' %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}",
    "OpenAI's parts or strings": "{% for m in messages %}[{{ m.role }}]{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{% if 'image_url' in p %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}",
    "parts with an image": "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}"
    "{% if p.image is defined %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}",
    "places of images": "{% for m in messages %}[{{ m.role }}]{% for p in m.content %}"
    "{% if p.type == 'image_url' %}{{ p.image_url.url }}{% else %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}",
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


def test_later_system_messages() -> None:
    """Two that follow each other are one turn by then."""
    first, answer, question = TURNS
    turns = [first, answer, Turn("system", ("s",)), question]
    assert render(STRINGS["attribute"], turns) == "[user]a<image>bc[assistant]d[system]s[user]e"
    assert render(PARTS["get"], [Turn("system", ("r",)), *turns]).endswith("c[assistant]d[system]s[user]e")
    at_the_start = "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    leaves_out = at_the_start + PARTS["attribute"].replace("messages %}", "messages if m.role != 'system' %}")
    refuses = "{% for m in messages[1:] if m.role == 'system' %}{{ raise_exception('no') }}{% endfor %}"
    for source in (leaves_out, refuses + PARTS["attribute"]):
        with pytest.raises(RequestError, match="a system message follows others, expected it first") as caught:
            render(source, turns)
        assert caught.value.field == "messages"


CHANGED = {
    "upper": ("{{ m.content | upper }}", str.upper),
    "lower": ("{{ m.content.lower() }}", str.lower),
    "title": ("{{ m.content | title }}", str.title),
    "escape": ("{{ m.content | e }}", str),
    "without images": ("{{ m.content.replace('<image>', '') }}", str),
    "without tags": ("{{ m.content | striptags }}", str),
}


@pytest.mark.parametrize("name", CHANGED)
def test_images_and_routers_stay_where_a_template_changes_letters(name: str) -> None:
    content, change = CHANGED[name]
    template = JinjaTemplate("{% for m in messages %}[" + content + "]{% endfor %}", {}, "<|picture|>")
    turns = [Turn("user", ("ab", Marker.IMAGE, " cD", Marker.ROUTER)), Turn("assistant", ("eF \ue000",))]
    expected = f"[{change('ab')}<image>{change(' cD')}<ROUTER>][{change('eF')} \ue000]"
    assert template.render(turns, "<ROUTER>", ChatOptions()) == expected
    options = ChatOptions(add_generation_prompt=False, continue_final_message=True)
    assert template.render(turns, "<ROUTER>", options) == expected[:-1]


@pytest.mark.parametrize("name", ["upper", "lower", "title"])
def test_parts_whose_letters_change(name: str) -> None:
    content, change = CHANGED[name]
    source = "{% for m in messages %}[{% for p in m.content %}{% if p.type == 'image' %}<image>{% else %}"
    template = JinjaTemplate(
        source + content.replace("m.content", "p.text") + "{% endif %}{% endfor %}]{% endfor %}", {}, None
    )
    turns = [Turn("user", ("aB", Marker.IMAGE, "c", Marker.ROUTER))]
    assert template.render(turns, "<ROUTER>", ChatOptions()) == f"[{change('aB')}<image>{change('c')}<ROUTER>]"


LOOP = "{% for m in messages %}[@]{% endfor %}"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("{{ m.content }}{{ m.content }}", "writes a message 2 times, expected once"),
        ("{{ m.content ~ '!' ~ m.content | upper }}", "writes a message 2 times, expected once"),
        ("{% for p in m.content %}{{ p.text or '<image>' }}{{ p.text }}{% endfor %}", "writes a message 2 times"),
        ("{{ m.content.split('\\n')[-1] }}", "writes 0 placeholders for one image, expected one: <image>$"),
        ("{% for p in m.content %}{{ p.text }}{% endfor %}", "writes 0 placeholders for one image"),
        ("{{ '<image>' ~ m.content }}", "writes 4 placeholders for one image"),
        ("{{ '<image>' ~ m.content if loop.first else m.content }}", "writes 2 placeholders for one image"),
    ],
)
def test_templates_that_no_image_could_use(content: str, named: str) -> None:
    with pytest.raises(RequestError, match=f"^the chat template {named}"):
        JinjaTemplate(LOOP.replace("@", content), {}, None)
    if "writes 0" in named:  # a model without a vision tower has no images
        template = JinjaTemplate(LOOP.replace("@", content), {}, None, takes_images=False)
        assert "a question]" in template.render([Turn("user", ("a question",))], "", ChatOptions())


def test_an_image_token_for_each_row() -> None:
    source = LOOP.replace("@", "{% for p in m.content %}{{ p.text or '<|picture|>' * 9 }}{% endfor %}")
    template = JinjaTemplate(source, {}, "<|picture|>")
    assert template.render([Turn("user", (Marker.IMAGE, "a"))], "", ChatOptions()) == f"[{'<|picture|>' * 9}a]"


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
