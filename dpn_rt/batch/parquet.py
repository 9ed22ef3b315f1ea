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
from typing import TYPE_CHECKING, Any

from dpn_rt.batch.actor_pool import PURPOSE
from dpn_rt.batch.options import AnswerOptions
from dpn_rt.batch.processor import Processor
from dpn_rt.errors import RequestError
from dpn_rt.format.fingerprint import fingerprint
from dpn_rt.schema.packages import load_package, load_ray

if TYPE_CHECKING:
    import pyarrow as pa

PARTS, SETTINGS = "answers", "settings.json"
"""In the folder of a job: its files of answers, and what they depend on."""
log = logging.getLogger(__name__)


def answer_parquet(
    questions: str | Path, output: str | Path, processor: Processor, *, id_column: str = "id", rows_per_file: int = 256
) -> None:
    """Answers the questions of parquet files, each once, however often the job is killed and called again.

    Files of answers appear as a whole, so what has been answered is what stands in them. A job that was killed repeats
    the rows of unfinished files alone.

    Args:
        questions: a file or a folder of them.
        output: folder of the job, on a disk that all machines share; made where there is none.
        processor: adds the answers.
        id_column: column of whole numbers or texts, of which each stands once.
        rows_per_file: questions of one file of answers.

    Raises:
        RequestError: the ids are not unique, the folder has answers that were made in another way, or another job
            writes there.
    """
    data = load_ray("ray.data", PURPOSE)
    ids = _question_ids(questions, id_column)
    parts = Path(output).resolve() / PARTS
    parts.mkdir(parents=True, exist_ok=True)
    with _settings_file(parts.parent / SETTINGS, _settings(processor.answers, id_column)):
        for unfinished in parts.glob(".*.tmp"):
            unfinished.unlink()
        done = _answered_ids(parts, id_column)
        if len(done) >= len(ids):
            return
        dataset = data.read_parquet(str(questions)).map_batches(
            partial(_without, ids=done, id_column=id_column), batch_format="pyarrow", batch_size=None
        )
        answered = processor(dataset.repartition(target_num_rows_per_block=rows_per_file))
        warning = processor.pool.takes_all_cores()
        if warning is not None:
            log.warning(warning)
        written = answered.map_batches(
            partial(_write, folder=parts, id_column=id_column), batch_format="pyarrow", batch_size=None
        )
        for _ in written.iter_batches():  # it is computed as it is read
            pass


def read_answers(questions: str | Path, output: str | Path, *, id_column: str = "id") -> pa.Table:
    """The answers of a finished job, in the order of its questions.

    Raises:
        RequestError: questions have no answers yet.
    """
    pyarrow = load_package("pyarrow", PURPOSE, "ray", RequestError)
    dataset = load_package("pyarrow.dataset", PURPOSE, "ray", RequestError)
    wanted, files = _question_ids(questions, id_column), _files(Path(output) / PARTS)
    places: dict[Any, int] = {}
    if files:
        answers = dataset.dataset(files, format="parquet").to_table()
        places = {value: place for place, value in enumerate(answers[id_column].to_pylist())}
    missing = sum(value not in places for value in wanted)
    if missing:
        raise RequestError(
            f"{output}: {missing} of {len(wanted)} questions have no answer yet: call answer_parquet again"
        )
    return answers.take(pyarrow.array([places[value] for value in wanted]))


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


def _answered_ids(parts: Path, id_column: str) -> pa.Array:
    pyarrow = load_package("pyarrow", PURPOSE, "ray", RequestError)
    dataset = load_package("pyarrow.dataset", PURPOSE, "ray", RequestError)
    files = _files(parts)
    if not files:
        return pyarrow.array([], pyarrow.null())
    return dataset.dataset(files, format="parquet").to_table(columns=[id_column])[id_column].combine_chunks()


def _question_ids(questions: str | Path, id_column: str) -> list[Any]:
    """The ids of all questions.

    Raises:
        RequestError: the column is missing, or an id is null or stands twice.
    """
    dataset = load_package("pyarrow.dataset", PURPOSE, "ray", RequestError)
    table = dataset.dataset(str(questions), format="parquet")
    if id_column not in table.schema.names:
        raise RequestError(f"{questions}: no column {id_column!r}, expected one of {', '.join(table.schema.names)}")
    ids: list[Any] = table.to_table(columns=[id_column])[id_column].to_pylist()
    if None in ids or len(set(ids)) < len(ids):
        twice = next(value for value in ids if value is None or ids.count(value) > 1)
        raise RequestError(f"{questions}: {id_column}={twice!r}, expected every id once, and none of them null")
    return ids


def _settings(options: AnswerOptions, id_column: str) -> dict[str, Any]:
    """What answers depend on, and the ids by which they are found."""
    settings = {**asdict(options), "engine": fingerprint(options.engine), "id_column": id_column}
    return dict(json.loads(json.dumps(settings, default=str)))


@contextmanager
def _settings_file(path: Path, wanted: dict[str, Any]) -> Iterator[None]:
    """Writes what a job's answers depend on, or compares it with what an earlier call has written, and keeps other jobs
    away meanwhile.

    Raises:
        RequestError: they differ, or another job has the file.
    """
    with path.open("a+", encoding="utf-8") as file:
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
            _compare(path.parent, json.loads(text), wanted)
        yield


def _compare(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    names = [name for name in wanted if found.get(name) != wanted[name]]
    if names:
        first, second = (", ".join(f"{name}={each.get(name)}" for name in names) for each in (found, wanted))
        raise RequestError(f"{folder}: has answers of {first}, expected {second}: choose another folder")
