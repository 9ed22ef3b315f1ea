"""A report as one page of HTML that needs no other file."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image

from dpn_rt.evaluate.reports.samples import Sample, Side
from dpn_rt.evaluate.reports.summary import RunSummary
from dpn_rt.evaluate.reports.tables import FOOTNOTE, categories_table, runs_table
from dpn_rt.evaluate.trace import TIMES

IMAGE_SIDE = 220
QUALITY = 75
"""Of JPEG."""
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1b1f24; }
table { border-collapse: collapse; margin: 1rem 0; font-size: 13px; display: block; overflow-x: auto; }
th, td { border: 1px solid #d0d7de; padding: .25rem .5rem; text-align: left; vertical-align: top; }
th { background: #f3f5f7; }
img { max-width: 100%; height: auto; }
.plots { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start; } .plots img { max-height: 25rem; }
.sample { border-top: 2px solid #d0d7de; padding: 1rem 0; display: grid; grid-template-columns: 230px 1fr; gap: 1rem; }
.sample h3 { grid-column: 1 / -1; margin: 0; font-size: 15px; white-space: pre-wrap; }
.side { margin-bottom: 1rem; } .right { color: #116329; } .wrong { color: #a40e26; }
.answer { font-weight: 600; white-space: pre-wrap; } .small { color: #57606a; font-size: 13px; }
pre { font-size: 12px; overflow-x: auto; background: #f3f5f7; padding: .5rem; }
@media (max-width: 45rem) { .sample { grid-template-columns: 1fr; } }
"""


def page(
    title: str,
    runs: Sequence[RunSummary],
    plots: Mapping[str, bytes],
    samples: Sequence[Sample],
    num_differing: int,
    compared: tuple[str, str] | None,
) -> bytes:
    """The page.

    Args:
        title: of the benchmark.
        runs: at least one.
        plots: file name -> PNG.
        samples: with their pictures.
        num_differing: questions whose answers differ in all; `samples` may be the first of them.
        compared: names of the two runs that the samples compare; None where there is one run.
    """
    name = escape(title)
    body = [f"<h1>{name}</h1>", _table(*runs_table(runs)), f'<p class="small">{escape(FOOTNOTE)}</p>']
    header, lines = categories_table(runs)
    if lines:
        body += ["<h2>Kinds of questions</h2>", _table(header, lines)]
    images = [f'<img src="{_url(data, "png")}" alt="{escape(plot)}">' for plot, data in plots.items()]
    body.append(f'<div class="plots">{"".join(images)}</div>')
    if compared is not None:
        first, second = map(escape, compared)
        body.append(f"<h2>Where {first} and {second} differ: {num_differing} questions</h2>")
        if len(samples) < num_differing:
            body.append(f"<p>The first {len(samples)}; those that are right in one run alone come before others.</p>")
        body += [_sample(sample, compared) for sample in samples]
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style></head>\n<body>\n{chr(10).join(body)}\n</body></html>\n"
    ).encode()


def _table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    rows = ["".join(f"<td>{escape(cell)}</td>" for cell in line) for line in lines]
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in rows)}</table>"


def _sample(sample: Sample, compared: tuple[str, str]) -> str:
    category = f"{escape(sample.category)}, " if sample.category else ""
    picture = f'<p class="small">{escape(sample.problem)}</p>'
    if sample.image is not None:
        small = sample.image.copy()
        small.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
        picture = f'<img src="{_picture(small)}" alt="picture of question {escape(sample.question_id)}">'
    sides = "".join(_side(side, name) for side, name in zip(sample.sides, compared, strict=True))
    truth = escape("; ".join(sample.truth))
    return (
        f'<div class="sample"><h3>{escape(sample.prompt)}</h3><div>{picture}'
        f'<p class="small">{category}question {escape(sample.question_id)}<br>right: {truth}</p></div>'
        f"<div>{sides}</div></div>"
    )


def _side(side: Side, name: str) -> str:
    kind = "right" if side.points >= 0.5 else "wrong"
    cells = "" if side.picture is None else f'<img src="{_picture(side.picture)}" alt="cells that {escape(name)} saw">'
    values = {key: value for key, value in side.answer.metadata.items() if key not in ("pyramid", TIMES)}
    trace = escape(json.dumps(values, ensure_ascii=False, indent=1))
    return (
        f'<div class="side"><span class="small">{escape(name)}: {100 * side.points:.0f} %</span> '
        f'<span class="answer {kind}">{escape(side.answer.text)}</span><br>{cells}'
        f"<details><summary>trace</summary><pre>{trace}</pre></details>"
        "</div>"
    )


def _picture(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "JPEG", quality=QUALITY)
    return _url(buffer.getvalue(), "jpeg")


def _url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
