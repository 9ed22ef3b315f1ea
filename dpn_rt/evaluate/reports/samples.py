"""Questions that two runs answered differently, with what each saw of the picture."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from dpn_rt.engine.loader import load_processor
from dpn_rt.errors import DpnError
from dpn_rt.evaluate.images import ImageSource
from dpn_rt.evaluate.readers.rows import BadRow
from dpn_rt.evaluate.reports.summary import RunSummary, category_of
from dpn_rt.evaluate.scorers.truth import Answer
from dpn_rt.evaluate.source import QuestionSource
from dpn_rt.evaluate.trace import pyramid_of
from dpn_rt.prompts.processor import Processor
from dpn_rt.settings import EngineOptions

PANEL = 128
"""Pixels of a stage."""


@dataclass(frozen=True)
class Side:
    """One run's answer."""

    answer: Answer
    points: float
    picture: Image.Image | None = None
    """The cells of each stage; None for answers without a trace."""


@dataclass(frozen=True)
class Sample:
    """A question with two answers that differ."""

    question_id: str
    prompt: str
    category: str
    truth: tuple[str, ...]
    sides: tuple[Side, Side]
    image: Image.Image | None = None
    """As the vision encoder saw it."""
    problem: str = ""
    """Why there is no image."""


def differing(first: RunSummary, second: RunSummary) -> list[Sample]:
    """The questions whose answers differ, those that are right in one run alone before others."""
    answers = {
        (answer.question_id, answer.round_id, answer.prompt): (graded, answer) for graded, answer in second.answers
    }
    samples = []
    for graded, answer in first.answers:
        other = answers.get((answer.question_id, answer.round_id, answer.prompt))
        if other is not None and other[1].text != answer.text:
            sides = (Side(answer, graded.points), Side(other[1], other[0].points))
            truth = tuple(dict.fromkeys(graded.truth.answers))
            samples.append(Sample(answer.question_id, answer.prompt, category_of(graded, answer), truth, sides))
    return sorted(samples, key=lambda sample: sample.sides[0].points == sample.sides[1].points)


def with_pictures(samples: Sequence[Sample], source: QuestionSource, engine: Path) -> Iterator[Sample]:
    """Samples with their images, and what each stage saw of them.

    Args:
        samples: few, since their images are all in memory.
        source: of the questions.
        engine: that answered; its weights are not loaded.

    Raises:
        EvaluationError: the question file cannot be read; EngineError: the engine cannot.
    """
    processor = load_processor(engine, "auto", EngineOptions(), verify=False)
    images = _images({sample.question_id for sample in samples}, source)
    for sample in samples:
        yield _with_picture(sample, images, processor)


def _images(question_ids: set[str], source: QuestionSource) -> dict[str, ImageSource]:
    found: dict[str, ImageSource] = {}
    for question in source.questions():
        if not isinstance(question, BadRow) and str(question.question_id) in question_ids and question.images:
            found[str(question.question_id)] = question.images[0]
    return found


def _with_picture(sample: Sample, images: Mapping[str, ImageSource], processor: Processor) -> Sample:
    source = images.get(sample.question_id)
    if source is None:
        return _changed(sample, problem="the question has no image")
    try:
        content = [{"type": "image", "image": source.open()}, {"type": "text", "text": "?"}]
        seen = processor.seen_image(processor.chat([{"role": "user", "content": content}]))
    except DpnError as error:
        return _changed(sample, problem=str(error))
    first, second = (_drawn(side, seen) for side in sample.sides)
    return _changed(sample, (first, second), seen)


def _drawn(side: Side, seen: Image.Image) -> Side:
    if "pyramid" not in side.answer.metadata:
        return side
    pyramid = pyramid_of(side.answer.metadata)
    return Side(side.answer, side.points, pyramid.draw(seen, PANEL))


def _changed(
    sample: Sample, sides: tuple[Side, Side] | None = None, image: Image.Image | None = None, problem: str = ""
) -> Sample:
    return Sample(
        sample.question_id, sample.prompt, sample.category, sample.truth, sides or sample.sides, image, problem
    )
