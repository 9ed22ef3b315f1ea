"""Questions of a file, one after the other, whatever its format."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate.question import PromptStyle, Question
from dpn_rt.evaluate.readers.files import read_rows
from dpn_rt.evaluate.readers.prompts import questions_of_row
from dpn_rt.evaluate.readers.rows import BadRow, Row
from dpn_rt.schema.files import is_directory


@dataclass(frozen=True)
class QuestionSource:
    """A file of questions, or one of several equal parts of it."""

    path: Path
    image_folder: Path
    style: PromptStyle = field(default_factory=PromptStyle)
    num_chunks: int = 1
    chunk_idx: int = 0

    def questions(self) -> Iterator[Question | BadRow]:
        """The questions, and the rows that are none, in the order of the file; images are not opened.

        Raises:
            EvaluationError: the file cannot be read, or has another format than its name says.
        """
        places: dict[str, str] = {}
        for row in self._rows():
            if isinstance(row, BadRow):
                yield row
                continue
            for question in questions_of_row(row, self.image_folder, self.style):
                if isinstance(question, Question):
                    first = places.setdefault(question.key, question.place)
                    if first != question.place:
                        yield BadRow(row.place, question.question_id, f"the same question_id and text as {first}")
                        break
                yield question

    def _rows(self) -> Iterator[Row | BadRow]:
        """Of the chunk: LLaVA's chunks are equal but for the last one."""
        if self.num_chunks == 1:
            yield from read_rows(self.path)
            return
        size = math.ceil(sum(1 for _ in read_rows(self.path)) / self.num_chunks)
        for number, row in enumerate(read_rows(self.path)):
            if number // max(size, 1) == self.chunk_idx:
                yield row


@dataclass(frozen=True)
class Scan:
    """What a first pass over a source found."""

    places: dict[str, int]
    """Key of a question -> its number in the file."""
    bad_rows: list[BadRow]

    @classmethod
    def of(cls, source: QuestionSource) -> Scan:
        """Reads the whole file, and keeps no texts or images.

        Raises:
            EvaluationError: the file cannot be read, none of its rows is a question, or the folder of images is none.
        """
        if not is_directory(source.image_folder):
            raise EvaluationError(f"--image-folder {source.image_folder}: not a directory, expected that of the images")
        places: dict[str, int] = {}
        bad_rows: list[BadRow] = []
        for question in source.questions():
            if isinstance(question, BadRow):
                bad_rows.append(question)
            else:
                places[question.key] = len(places)
        if bad_rows and not places:
            raise EvaluationError(f"{source.path}: none of its {len(bad_rows)} rows is a question: {bad_rows[0]}")
        if not places and source.num_chunks == 1:  # one of several chunks may well be empty
            raise EvaluationError(f"{source.path}: has no rows, expected questions")
        return cls(places, bad_rows)
