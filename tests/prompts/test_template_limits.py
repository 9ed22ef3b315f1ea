"""Chat templates are programs of strangers: none may take much time, memory or text, or leave its process."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from dpn_rt.builders.chat_template import check_chat_template
from dpn_rt.errors import CheckpointError, RequestError
from dpn_rt.prompts.messages import Marker, Turn
from dpn_rt.prompts.template import ChatOptions, JinjaTemplate
from dpn_rt.prompts.template_process import MOST_SOURCE, TemplateProcess
from tests.prompts.test_template import PARTS, STRINGS, TURNS

HONEST = STRINGS["attribute"]
DOUBLING = "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}"
TIME, MEMORY, TEXT = "takes more than 0.5 s", "more than 512 MB of memory", "characters, expected at most"
LIMITED = {
    "nested loops": ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", TIME),
    "macros": ("{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}", TIME),
    "a power": ("{{ 9 ** (9 ** (messages | length + 6)) }}", TIME),
    "lists in lists": (DOUBLING + "{% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}"
                       "{{ ns.a == ns.b }}", TIME),
    "a filter": ("{{ ('a' * 3000000) | wordwrap(messages | length) }}", TIME),
    "a long string": ("{{ 'a' * 10**10 }}", MEMORY),
    "a wide number": ("{{ '%10000000000d' % 1 }}", MEMORY),
    # By so much a round that little is written before the limit: a slow machine would reach the other one first.
    "a growing string": (DOUBLING + "{% set ns.a = " + " ~ ".join(["ns.a"] * 64) + " %}{% endfor %}", MEMORY),
    "a long text": ("{% for a in range(20) %}{{ 'a' * 10**6 }}{% endfor %}", TEXT),
}  # fmt: skip
REFUSED = {
    "a huge range": "{% for a in range(10**12) %}{% endfor %}",
    "a class": "{{ messages.__class__.__mro__ }}",
    "a class by its name": "{{ '{0.__class__.__mro__}'.format(messages) }}",
    "globals": "{{ cycler.__init__.__globals__.os.getcwd() }}",
    "a file": "{% include '/etc/passwd' %}",
    "a module": "{% import 'os' as os %}",
    "a change": "{{ messages.append(1) }}",
    "endless macros": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
}


def at_request(attack: str) -> JinjaTemplate:
    """A template that is honest until it gets a variable."""
    return JinjaTemplate(HONEST + "{% if x is defined %}" + attack + "{% endif %}", {}, None)


@pytest.mark.parametrize("name", LIMITED)
def test_limits(name: str) -> None:
    attack, reason = LIMITED[name]
    template = at_request(attack)
    with pytest.raises(RequestError, match=reason):
        template.render(TURNS, "", ChatOptions(template_kwargs={"x": 1}))
    assert template.render(TURNS, "", ChatOptions()) == "[user]a<image>bc[assistant]d[user]e"


@pytest.mark.parametrize("name", ["a power", "a wide number", "a long text"])
def test_limits_at_build(name: str, tmp_path: Path) -> None:
    attack, reason = LIMITED[name]
    with pytest.raises(CheckpointError, match=f"chat_template cannot be used: .*{reason}"):
        check_chat_template(HONEST + attack, {}, None, tmp_path)


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_sandbox_refuses(name: str) -> None:
    template = at_request(REFUSED[name])
    with pytest.raises(RequestError, match="^messages do not suit the model's chat template$"):
        template.render(TURNS, "", ChatOptions(template_kwargs={"x": 1}))


@pytest.mark.parametrize(
    "source",
    [
        "{{ 1 }}" * (MOST_SOURCE // 6),
        HONEST + "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
        HONEST + "{{ " + "[" * 50_000 + "]" * 50_000 + " }}",
        HONEST + "{% if 1 %}" * 3000 + "{% endif %}" * 3000,
    ],
    ids=["long", "brackets", "lists", "blocks"],
)
def test_long_and_deep_templates(source: str) -> None:
    with pytest.raises(RequestError, match="chat template"):
        JinjaTemplate(source, {}, None)


def test_what_a_template_says_is_short_and_one_line() -> None:
    template = at_request("{{ raise_exception('a\\n\\u001b[2Jb' + x) }}")
    with pytest.raises(RequestError) as caught:
        template.render(TURNS, "", ChatOptions(template_kwargs={"x": "y" * 10**7}))
    assert str(caught.value) == "messages do not suit the model's chat template: a  [2Jb" + "y" * 193


def test_threads_get_their_own_texts_while_one_renders_too_long() -> None:
    template = at_request(LIMITED["nested loops"][0])

    def render(number: int) -> str:
        options = ChatOptions(template_kwargs={"x": 1} if number == 5 else {})
        try:
            return template.render([Turn("user", (f"question {number}",))], "", options)
        except RequestError:
            return "refused"

    with ThreadPoolExecutor(4) as pool:
        texts = list(pool.map(render, range(20)))
    assert texts == ["refused" if number == 5 else f"[user]question {number}" for number in range(20)]


def test_a_process_that_was_killed_is_replaced() -> None:
    before = children()
    process = TemplateProcess("{{ x }}")
    assert process.render({"x": 1}) == "1"
    (child,) = children() - before
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert process.render({"x": 2}) == "2"
    (child,) = children() - before
    del process
    assert not child.is_running()


def test_a_fork_gets_a_process_of_its_own() -> None:
    process = TemplateProcess("{{ x }}")
    assert process.render({"x": 1}) == "1"
    pid = os.fork()
    if not pid:
        os._exit(0 if process.render({"x": 2}) == "2" else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert process.render({"x": 3}) == "3"


def children() -> set[psutil.Process]:
    return {p for p in psutil.Process().children() if p.status() != psutil.STATUS_ZOMBIE}


def test_variables_that_are_no_json() -> None:
    template = at_request("{{ x }}")
    assert template.render(TURNS, "", ChatOptions(template_kwargs={"x": object()})).endswith("e<object>")
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(RequestError, match="too deep"):
        template.render(TURNS, "", ChatOptions(template_kwargs={"x": deep}))


FEATURES = {
    "JSON": "{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': 'é<'} | tojson(sort_keys=true) }}",
    "break": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{% set a = 1 %}{{ m }}{% endgeneration %}{{ a }}{% endfor %}",
    "space": "{% for m in messages %}\n    {% if m %}\n  {{ m.role }}  \n    {%- endif %}\n{% endfor %}\n",
    "namespace": "{% set ns = namespace(a=1) %}{% set ns.b = dict(c=2) %}{{ ns.a }}{{ ns.b }}",
    "time": "{{ strftime_now('%Y') }}{{ tools }}{{ documents }}{{ bos_token }}{{ add_generation_prompt }}",
    "halves": "{{ messages[0].content }}\ud800",
}  # fmt: skip


@pytest.mark.parametrize("source", [*STRINGS.values(), *PARTS.values(), *FEATURES.values()])
@pytest.mark.parametrize("adds", [True, False])
def test_texts_are_those_of_transformers(source: str, adds: bool) -> None:
    content = [{"type": "image"}, {"type": "text", "text": "é\n"}] if source in PARTS.values() else "é\n"
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}]
    if source == PARTS["strings of assistants"] or isinstance(content, str):
        messages[1]["content"] = "b"
    else:
        messages[1]["content"] = [{"type": "text", "text": "b"}]
    given = {"bos_token": "<s>", "x": [1, 2.5, None, {"a": "é"}]}
    expected, _ = render_jinja_template([messages], chat_template=source, add_generation_prompt=adds, **given)
    variables = {**given, "messages": messages, "tools": None, "documents": None, "add_generation_prompt": adds}
    assert TemplateProcess(source).render(variables) == expected[0]


@pytest.mark.parametrize("last", ["An answer", "An answer  ", " \n", ""])
@pytest.mark.parametrize("name", ["attribute", "trimmed", "method"])
def test_continued_messages_are_those_of_transformers(name: str, last: str) -> None:
    source = STRINGS[name] + "</s>"
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": last}]
    expected, _ = render_jinja_template([messages], chat_template=source, continue_final_message=True)
    options = ChatOptions(add_generation_prompt=False, continue_final_message=True)
    turns = [Turn("user", ("a",)), Turn("assistant", (last,))]
    assert JinjaTemplate(source, {}, None).render(turns, "", options) == expected[0]


def test_a_continued_message_without_text_or_end() -> None:
    options = ChatOptions(add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(RequestError, match="leaves out the end"):
        JinjaTemplate(STRINGS["attribute"].replace("m.content }}", "m.content[:60] }}"), {}, None).render(
            [Turn("user", ("a",)), Turn("assistant", (7 * "A long answer that is cut",))], "", options
        )
    with pytest.raises(RequestError, match="no text to continue"):
        JinjaTemplate(PARTS["get"], {}, None).render(
            [Turn("user", ("a", Marker.IMAGE)), Turn("assistant", ())], "", options
        )
