"""The process that renders a chat template: `python template_worker.py SECONDS BYTES CHARACTERS`.

A template is a program of strangers, so the system ends this process where it takes too long, and gives it no more
memory. The process imports nothing of the product: it starts in a tenth of a second and has no weights or keys to lose.

Reads JSON, a line at a time: first the template's source, then the variables of each rendering. Writes a JSON object
for each rendering: `text`; or `raised` (what the template says is wrong), `line` (no valid Jinja), `characters` (of a
text that is too long), `memory` (there was not enough), or nothing, for any other failure.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from datetime import datetime
from typing import Any

from jinja2 import Template, nodes
from jinja2.exceptions import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_REASON = 200
"""Characters of what a template says is wrong."""


def main() -> None:
    """Renders until the input ends."""
    seconds, memory, characters = float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    memory = memory if hard == resource.RLIM_INFINITY else min(memory, hard)
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    lines = iter(sys.stdin.buffer)
    source = str(json.loads(next(lines)))
    template: Template | None = None
    for line in lines:
        # Of the processor's time, and ended by the system: Python's own signals wait for the end of a long operation.
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            template = template or environment().from_string(source)
            reply = json.dumps(_bounded(template.render(json.loads(line)), characters))
        except Exception as error:  # a template may raise anything
            reply = json.dumps(_failure(error))
        signal.setitimer(signal.ITIMER_PROF, 0)
        try:
            sys.stdout.write(reply + "\n")
            sys.stdout.flush()
        except BrokenPipeError:  # the product's process has ended
            break
    os._exit(0)  # in order, Python would try to write once more


def environment() -> ImmutableSandboxedEnvironment:
    """What templates are written for: as in transformers."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    made.filters["tojson"] = _tojson
    made.globals["raise_exception"] = _raise_exception
    made.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return made


class _Generation(Extension):
    """`{% generation %}` marks, for training alone, what the assistant says."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Jinja's own filter escapes characters for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: Any) -> None:
    raise TemplateError(str(message))


def _bounded(text: str, most: int) -> dict[str, Any]:
    return {"characters": len(text)} if len(text) > most else {"text": text}


def _failure(error: Exception) -> dict[str, Any]:
    if isinstance(error, TemplateSyntaxError):
        return {"line": error.lineno}
    if type(error) is TemplateError and error.message:
        return {"raised": "".join(c if c.isprintable() else " " for c in error.message[:MOST_REASON])}
    return {"memory": True} if isinstance(error, MemoryError) else {}


if __name__ == "__main__":
    main()
