"""MME: two questions to be answered with yes or no about each picture. https://arxiv.org/abs/2306.13394.

An answer in lower case is yes or no where it is that word, else where its first four characters have "yes", else "no";
any other is neither. A task's score is its accuracy in per cent plus the share of its pictures, in per cent, whose
questions are all right (at most 200). Perception is the sum of ten tasks, cognition that of four, the total both.

Annotations: MME's directory, with a folder for each task: `<image>.txt` beside the images or in `questions_answers_YN`,
a question, a tab and an answer each line. Or rows with `question_id`, `text`, `answer` and `category`; those of one
image have the same id. Hints on how to answer do not belong to a question.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate.scorers.benchmark import Benchmark, percent
from dpn_rt.evaluate.scorers.exact import truth_of_row
from dpn_rt.evaluate.scorers.truth import Answer, Graded, Inputs, Truth, good_rows
from dpn_rt.schema.files import TEXT_BYTES, read_text

PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
HINTS = ("Answer the question using a single word or phrase.", "Please answer yes or no.")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


def said(text: str) -> str:
    """ "yes", "no" or "other"."""
    answer = text.lower()
    if answer in ("yes", "no"):
        return answer
    return next((word for word in ("yes", "no") if word in answer[:4]), "other")


def asked(prompt: str) -> str:
    """The question without hints on how to answer."""
    for hint in HINTS:
        prompt = prompt.replace(hint, "")
    return prompt.strip()


def read(inputs: Inputs) -> list[Truth]:
    """The answers; `group` is the image."""
    if inputs.annotations.is_dir():
        truths = [truth for task in sorted(inputs.annotations.iterdir()) if task.is_dir() for truth in _of_task(task)]
        if not truths:
            raise EvaluationError(f"{inputs.annotations}: expected a folder for each task of MME there")
        return truths
    truths = []
    for row in good_rows(inputs.annotations):
        truth = truth_of_row(row, str(inputs.annotations))
        answer = truth.answers[0].strip().lower()
        if answer not in ("yes", "no"):
            raise EvaluationError(f"question {truth.ids[0]}: answer {answer!r:.100}, expected yes or no")
        group = str(row.values.get("image") if isinstance(row.values.get("image"), str) else truth.ids[0])
        truths.append(replace(truth, answers=(answer,), group=group))
    return truths


def _of_task(task: Path) -> list[Truth]:
    folder = task / "questions_answers_YN"
    truths = []
    for file in sorted((folder if folder.is_dir() else task).glob("*.txt")):
        for number, line in enumerate(read_text(file, EvaluationError, TEXT_BYTES).splitlines(), 1):
            question, tab, answer = line.strip().partition("\t")
            if not tab or answer.strip().lower() not in ("yes", "no"):
                raise EvaluationError(f"{file}: line {number}: expected a question, a tab, and Yes or No")
            name = f"{task.name}/{file.stem}"
            ids = tuple(f"{name}{suffix}" for suffix in (*IMAGE_SUFFIXES, ""))
            truths.append(Truth(ids, (answer.strip().lower(),), question, task.name, group=name))
    return truths


def grade(truth: Truth, answers: Sequence[Answer]) -> float:
    """1 where the answer is right."""
    return float(said(answers[0].text) == truth.answers[0])


def summarize(graded: Sequence[Graded]) -> dict[str, float]:
    """Total, perception and cognition, and the score of each task."""
    tasks: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for each in graded:
        tasks[each.truth.category][each.truth.group].append(each.points)
    scores = {}
    for task, images in sorted(tasks.items()):
        points = [point for image in images.values() for point in image]
        scores[task] = percent(points) + percent([min(image) for image in images.values()])
    sums = {
        "perception": sum(scores.get(task, 0.0) for task in PERCEPTION),
        "cognition": sum(scores.get(task, 0.0) for task in COGNITION),
    }
    return {"total": sum(scores.values()), **sums, **scores}


BENCHMARK = Benchmark("MME", read, grade, summarize, asked)
