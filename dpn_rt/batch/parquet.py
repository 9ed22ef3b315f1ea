"""Parquet files of questions -> parquet files of answers; a job that was killed goes on where it stopped."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dpn_rt.batch.actor_pool import PURPOSE
from dpn_rt.batch.options import LLM_LIMITS, AnswerOptions
from dpn_rt.batch.processor import Processor
from dpn_rt.batch.question_files import (
    check_text_column,
    check_texts,
    open_parquet,
    question_ids,
    read_columns,
)
from dpn_rt.errors import RequestError
from dpn_rt.format.fingerprint import fingerprint
from dpn_rt.schema.bounds import is_whole
from dpn_rt.schema.files import real_path
from dpn_rt.schema.json_text import parse_json
from dpn_rt.schema.packages import load_package, load_ray
from dpn_rt.schema.text import few, shown

if TYPE_CHECKING:
    import pyarrow as pa

PARTS, SETTINGS = "answers", "settings.json"
"""In the folder of a job: its files of answers, and what they depend on."""
ERROR = "error"
"""The column of `ANSWER_SCHEMA` that says why a row has no answer."""
log = logging.getLogger(__name__)


def answer_parquet(
    questions: str | Path,
    output: str | Path,
    processor: Processor,
    *,
    id_column: str = "id",
    rows_per_file: int = 256,
    retry_failed: bool = False,
) -> None:
    """Answers the questions of parquet files, each once, however often the job is killed and called again.

    Files of answers appear as a whole, so what has been answered is what stands in them. A job that was killed repeats
    the rows of unfinished files alone. What is wrong with files or arguments is told before anything is computed.

    Args:
        questions: a file or a folder of them.
        output: folder of the job, on a disk that all machines share; made where there is none.
        processor: adds the answers.
        id_column: column of whole numbers or texts, of which each stands once.
        rows_per_file: questions of one file of answers.
        retry_failed: whether questions that an earlier call could not answer, which have an `error`, are asked again.

    Raises:
        ConfigError: the cluster has no room for the actors.
        RequestError: the questions cannot be read, their columns do not fit, the ids are not unique, the folder cannot
            be written to, has answers to other questions or that were made in another way, or another job writes there.
    """
    data = load_ray("ray.data", PURPOSE)
    from dpn_rt.batch.columns import check_columns  # imports pyarrow, which comes with Ray

    if not is_whole(rows_per_file):
        raise RequestError(f"rows_per_file={shown(rows_per_file)}: expected a whole number of at least 1")
    name, options = str(questions), processor.answers
    asked = open_parquet(questions, name)
    check_columns(name, asked.schema.names, options, id_column)
    check_text_column(asked, name, options.question_column)
    ids = question_ids(asked, name, id_column)
    folder = real_path(output)
    parts = folder / PARTS
    _make(parts)
    with _settings_file(folder / SETTINGS, _settings(options, id_column)):
        for unfinished in parts.glob(".*.tmp"):
            unfinished.unlink()
        answered = _answered(parts, [id_column, options.question_column, *([ERROR] if retry_failed else [])])
        if answered is not None:
            check_texts(asked, name, answered, folder, options, id_column)
        done = _ids(_succeeded(answered) if retry_failed and answered is not None else answered, id_column)
        if set(ids) <= set(done.to_pylist()):
            return
        dataset = data.read_parquet(str(questions)).map_batches(
            partial(_without, ids=done, id_column=id_column), batch_format="pyarrow", batch_size=None
        )
        answers = processor(dataset.repartition(target_num_rows_per_block=rows_per_file))
        processor.pool.check_room()
        warning = processor.pool.takes_all_cores()
        if warning is not None:
            log.warning(warning)
        written = answers.map_batches(
            partial(_write, folder=parts, id_column=id_column), batch_format="pyarrow", batch_size=None
        )
        for _ in written.iter_batches():  # it is computed as it is read
            pass


def read_answers(questions: str | Path, output: str | Path, *, id_column: str = "id") -> pa.Table:
    """The answers of a finished job, in the order of its questions.

    Raises:
        RequestError: questions or answers cannot be read, or questions have no answers yet.
    """
    pyarrow = load_package("pyarrow", PURPOSE, "ray", RequestError)
    name, folder = str(questions), Path(output)
    asked = open_parquet(questions, name)
    if id_column not in asked.schema.names:
        raise RequestError(f"{name}: no column {id_column!r}, expected one of {few(asked.schema.names)}")
    wanted, answers = question_ids(asked, name, id_column), _answered(folder / PARTS, None)
    for column, expected in ((id_column, "the job's id_column"), (ERROR, "files that answer_parquet wrote")):
        if answers is not None and column not in answers.column_names:
            raise RequestError(f"{folder}: its answers have no column {column!r}: expected {expected}")
    places = {} if answers is None else _places(answers, id_column)
    missing = sum(value not in places for value in wanted)
    if missing:
        raise RequestError(
            f"{output}: {missing} of {len(wanted)} questions have no answer yet: call answer_parquet again"
        )
    if answers is None:
        return _no_answers(asked.schema, folder)
    return answers.take(pyarrow.array([places[value] for value in wanted], pyarrow.int64()))


def _places(answers: pa.Table, id_column: str) -> dict[int | str, int]:
    """Where each question's answer stands. One that was asked again has two: that without an error counts."""
    places: dict[int | str, int] = {}
    failed = answers[ERROR].is_valid().to_pylist()
    for place, (value, has_failed) in enumerate(zip(answers[id_column].to_pylist(), failed, strict=True)):
        if not has_failed or value not in places:
            places[value] = place
    return places


def _succeeded(answers: pa.Table) -> pa.Table:
    return answers.filter(answers[ERROR].is_null())


def _no_answers(schema: pa.Schema, folder: Path) -> pa.Table:
    """The table of a job without questions, which has no files."""
    from dpn_rt.batch.answer_schema import ANSWER_SCHEMA

    pyarrow = load_package("pyarrow", PURPOSE, "ray", RequestError)
    file = folder / SETTINGS
    settings = _read_settings(folder, file.read_text("utf-8", "replace")) if file.exists() else {}
    kept = [column for column in schema if column.name != settings.get("image_column")]
    return pyarrow.schema([*kept, *ANSWER_SCHEMA]).empty_table()


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{folder.parent}: answers cannot be written there: {error.strerror}") from error


def _without(table: pa.Table, ids: pa.Array, id_column: str) -> pa.Table:
    """The rows with other ids."""
    import pyarrow.compute as pc

    return table.filter(pc.invert(pc.is_in(table[id_column], value_set=ids.cast(table[id_column].type))))


def _write(table: pa.Table, folder: Path, id_column: str) -> pa.Table:
    """Writes a file of answers, as a whole or not at all. The same rows, written again, replace it.

    Returns:
        The number of its rows.
    """
    import pyarrow
    import pyarrow.parquet as pq

    if len(table):
        name = hashlib.sha256(json.dumps(table[id_column].to_pylist()).encode()).hexdigest()[:32]
        unfinished = folder / f".{name}.{uuid.uuid4().hex}.tmp"
        pq.write_table(table, unfinished)
        unfinished.replace(folder / f"{name}.parquet")
    return pyarrow.table({"rows": [len(table)]})


def _files(parts: Path) -> list[str]:
    return sorted(str(path) for path in parts.glob("*.parquet"))


def _answered(parts: Path, columns: list[str] | None) -> pa.Table | None:
    """Columns of the answers that there are; None: there are none.

    Raises:
        RequestError: a file of answers is damaged.
    """
    files, name = _files(parts), f"answers in {parts}"
    return read_columns(open_parquet(files, name), name, columns) if files else None


def _ids(answered: pa.Table | None, id_column: str) -> pa.Array:
    pyarrow = load_package("pyarrow", PURPOSE, "ray", RequestError)
    return pyarrow.array([], pyarrow.null()) if answered is None else answered[id_column].combine_chunks()


def _settings(options: AnswerOptions, id_column: str) -> dict[str, Any]:
    """How answers are made, and the ids by which they are found."""
    settings = {**asdict(options), "engine": fingerprint(options.engine), "id_column": id_column}
    return dict(json.loads(json.dumps(settings, default=str)))


@contextmanager
def _settings_file(path: Path, wanted: dict[str, Any]) -> Iterator[None]:
    """Writes what a job's answers depend on, or compares it with what an earlier call has written, and keeps other jobs
    away meanwhile.

    Raises:
        RequestError: they differ, or another job has the file.
    """
    with _opened(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"{path.parent}: another job writes there: expected a folder of its own") from None
        file.seek(0)
        text = file.read()
        if not text:
            file.write(json.dumps(wanted, indent=1) + "\n")
            file.flush()
        else:
            _compare(path.parent, _read_settings(path.parent, text), wanted)
        yield


def _opened(path: Path) -> TextIO:
    try:
        return path.open("a+", encoding="utf-8", errors="replace")
    except OSError as error:
        raise RequestError(f"{path.parent}: answers cannot be written there: {error.strerror}") from error


def _read_settings(folder: Path, text: str) -> dict[str, Any]:
    value = parse_json(text, str(folder / SETTINGS), RequestError)
    if not isinstance(value, dict):
        raise RequestError(f"{folder / SETTINGS}: not the settings of a job: choose another folder")
    return value


def _compare(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    before, now = _decisive(found), _decisive(wanted)
    names = [name for name in now if before.get(name) != now[name]]
    if names:
        first, second = (", ".join(f"{name}={each.get(name)}" for name in names) for each in (before, now))
        raise RequestError(f"{folder}: has answers of {first}, expected {second}: choose another folder")


def _decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings that change answers: a job goes on with other actors, or on a machine with less memory."""
    settings = dict(settings)
    of_llm = settings.pop("llm_options", None)
    limits = of_llm if isinstance(of_llm, dict) else {}
    return {**settings, **{name: limits.get(name) for name in LLM_LIMITS}}
