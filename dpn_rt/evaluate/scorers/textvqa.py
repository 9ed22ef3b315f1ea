"""TextVQA: questions about text in pictures. https://arxiv.org/abs/1904.08920, as LLaVA scores it.

Ten people answered each question. Answer and people's answers are processed as EvalAI does (`answer_text.py`); an
answer is worth the mean over the people of min(1, others who said so / 3).

Annotations: `TextVQA_0.5.1_val.json`, or rows with `answers`. LLaVA names a question by its image, so those of one
image are told apart by their text; its prompts have the question before or after the line with OCR tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from dpn_rt.evaluate.readers.files import read_json_file
from dpn_rt.evaluate.readers.rows import Row
from dpn_rt.evaluate.scorers.answer_text import submitted_answer, vqa_accuracy
from dpn_rt.evaluate.scorers.benchmark import Benchmark
from dpn_rt.evaluate.scorers.exact import read as read_rows
from dpn_rt.evaluate.scorers.exact import truth_of_row
from dpn_rt.evaluate.scorers.truth import Answer, Inputs, Truth, first_line, of_people

_OLD_PROMPT = re.compile(r"Question: (.*?) Short answer:", re.DOTALL)


def read(inputs: Inputs) -> list[Truth]:
    """The people's answers."""
    value = read_json_file(inputs.annotations) if inputs.annotations.suffix == ".json" else None
    if not isinstance(value, dict) or "data" not in value:
        return of_people(read_rows(inputs))
    truths = []
    for number, item in enumerate(value["data"], 1):
        truth = truth_of_row(Row(f"item {number} of data", item), str(inputs.annotations))
        truths.append(replace(truth, ids=(str(item.get("image_id", truth.ids[0])), *truth.ids)))
    return of_people(truths)


def asked(prompt: str) -> str:
    """The question within LLaVA's prompt."""
    old = _OLD_PROMPT.search(prompt) if prompt.startswith("OCR tokens: ") else None
    if old is not None:
        return old.group(1)
    lines = prompt.strip().split("\n")
    return lines[1].strip() if lines[0].startswith("Reference OCR token:") and len(lines) > 1 else first_line(prompt)


def grade(truth: Truth, answers: Sequence[Answer]) -> float:
    """See above."""
    return vqa_accuracy(submitted_answer(answers[0].text), [submitted_answer(answer) for answer in truth.answers])


BENCHMARK = Benchmark("TextVQA", read, grade, asked=asked)
