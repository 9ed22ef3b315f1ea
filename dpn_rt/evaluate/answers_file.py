"""The answers file of a run: grows by whole lines, survives a kill, and ends in the order of the questions."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate.question import question_key
from dpn_rt.evaluate.settings import difference
from dpn_rt.schema.files import real_path
from dpn_rt.schema.json_text import parse_json

FULL = (errno.ENOSPC, errno.EDQUOT)


class AnswersFile:
    """An open answers file. One process at a time has it."""

    def __init__(self, path: Path, settings: Mapping[str, Any], places: Mapping[str, int]) -> None:
        """Opens a file, or goes on with one that a run has left: half a line at its end is removed.

        Args:
            path: of the file; its directory is made.
            settings: of the run. They stand in every answer, and those that are there must have the same.
            places: key -> place of every question.

        Raises:
            EvaluationError: it cannot be written, is being written by another run, or holds other answers.
        """
        self.path, self._settings, self._places = path, settings, places
        self._lines: dict[str, tuple[int, int]] = {}
        self._file = _opened(path)
        try:
            self._lock()
            self._size = self._read()
        except BaseException:
            os.close(self._file)
            raise

    @staticmethod
    def check_writable(path: Path) -> None:
        """Refuses a file that could not be opened; a new one stays empty.

        Raises:
            EvaluationError: see the constructor.
        """
        os.close(_opened(path))

    @staticmethod
    def remove_empty(path: Path) -> None:
        """Removes a file without answers, unless another run has it."""
        with suppress(EvaluationError, OSError):
            file = _opened(path)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not os.fstat(file).st_size and _is_at(file, path):
                    path.unlink()
            finally:
                os.close(file)

    def __enter__(self) -> AnswersFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def __contains__(self, key: object) -> bool:
        return key in self._lines

    def __len__(self) -> int:
        return len(self._lines)

    def keys(self) -> frozenset[str]:
        """Of the questions that are answered."""
        return frozenset(self._lines)

    def append(self, key: str, answer: Mapping[str, Any]) -> None:
        """Adds an answer: all of its line or nothing.

        Raises:
            EvaluationError: the disk is full, or fails.
        """
        line = json.dumps(answer, ensure_ascii=False).encode() + b"\n"
        try:
            os.lseek(self._file, self._size, os.SEEK_SET)
            _write_all(self._file, line)
        except OSError as error:
            with suppress(OSError):
                os.ftruncate(self._file, self._size)
            raise self._failed(error) from error
        self._lines[key] = (self._size, len(line))
        self._size += len(line)

    def arrange(self) -> None:
        """Puts the answers into the order of the questions, and onto the disk: a kill leaves the old file or the new.

        Raises:
            EvaluationError: the disk is full, or fails.
        """
        order = sorted(self._lines, key=self._places.__getitem__)
        target = real_path(self.path)
        partial = target.with_name(f".{target.name}.partial")
        try:
            if order != list(self._lines):
                with partial.open("wb") as file:
                    for key in order:
                        offset, size = self._lines[key]
                        file.write(os.pread(self._file, size, offset))
                    file.flush()
                    os.fsync(file.fileno())
                partial.chmod(os.fstat(self._file).st_mode & 0o777)
                partial.rename(target)
            else:
                os.fsync(self._file)
        except OSError as error:
            with suppress(OSError):
                partial.unlink()
            raise self._failed(error) from error

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EvaluationError(
                f"{self.path}: another run is writing there: expected another --answers-file, or wait for it"
            ) from None
        except OSError as error:
            raise EvaluationError(f"{self.path}: answers cannot be written there: {error.strerror}") from error
        if not _is_at(self._file, self.path):  # until now another run had it
            raise EvaluationError(f"{self.path}: another run has just ended there: expected the same command again")

    def _read(self) -> int:
        """Reads the answers that are there, and returns the size of the file without half a line at its end."""
        offset = 0
        with os.fdopen(os.dup(self._file), "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                key = self._checked_key(line, f"{self.path}: line {number}")
                self._lines[key] = (offset, len(line))
                offset += len(line)
        os.ftruncate(self._file, offset)
        return offset

    def _checked_key(self, line: bytes, name: str) -> str:
        answer = parse_json(line, name, EvaluationError)
        keys = {"question_id", "prompt", "text", "metadata"}
        if not isinstance(answer, dict) or not keys <= set(answer) or not isinstance(answer["metadata"], dict):
            raise EvaluationError(f"{name}: not an answer: expected {', '.join(sorted(keys))}; move the file away")
        found = answer["metadata"].get("settings")
        if not isinstance(found, dict):
            raise EvaluationError(f"{name}: an answer of another program: expected another --answers-file")
        differs = difference(found, self._settings)
        if differs is not None:
            raise EvaluationError(f"{name}: its answer was {differs}: expected another --answers-file")
        key = question_key(answer["question_id"], answer.get("round_id"), answer["prompt"])
        if key not in self._places:
            raise EvaluationError(
                f"{name}: answers question {answer['question_id']!r:.100}, which is not among the questions, or has "
                "another text there: expected the same --question-file, --chunk-idx and prompts, or another "
                "--answers-file"
            )
        if key in self._lines:
            raise EvaluationError(f"{name}: answers question {answer['question_id']!r:.100} once more")
        return key

    def _failed(self, error: OSError) -> EvaluationError:
        reason = "the disk is full" if error.errno in FULL else f"cannot be written: {error.strerror}"
        return EvaluationError(
            f"{self.path}: {reason}; {len(self._lines):,} answers are kept: make room there, "
            "and the same command goes on"
        )


def _opened(path: Path) -> int:
    try:
        if not path.parent.exists():
            path.parent.mkdir(parents=True)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        raise EvaluationError(f"{path}: answers cannot be written there: {error.strerror}") from error
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise EvaluationError(f"{path}: answers cannot be written there: not a regular file")
    return file


def _is_at(file: int, path: Path) -> bool:
    """Whether the path names the open file, and not one that has taken its place."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _write_all(file: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(file, view) :]
