"""Parquet files of questions -> parquet files of answers; a job that was killed goes on where it stopped."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpn_rt.batch.options import AnswerOptions
from dpn_rt.batch.processor import Processor
from dpn_rt.errors import RequestError
from dpn_rt.format.fingerprint import fingerprint
from dpn_rt.schema.files import SETTINGS_BYTES, read_file
from dpn_rt.schema.packages import load_package, load_ray

if TYPE_CHECKING:
    import pyarrow as pa

PARTS, CHECKPOINT, SETTINGS = "answers", "checkpoint", "settings.json"
"""In the folder of a job: its answers, the ids of those that have been written, and what they depend on."""


def answer_parquet(
    questions: str | Path, output: str | Path, processor: Processor, *, id_column: str = "id", rows_per_file: int = 256
) -> None:
    """Answers the questions of parquet files, each once, however often the job is killed and called again.

    A file of answers counts once its ids have been written to a checkpoint, so a job that was killed repeats the rows
    of unfinished files alone (Ray Data's checkpoints).

    Args:
        questions: a file or a folder of them.
        output: folder of the job; made where there is none.
        processor: adds the answers.
        id_column: column of whole numbers or texts, of which each stands once.
        rows_per_file: questions of one file of answers.

    Raises:
        RequestError: the ids are not unique, or the folder has answers that were made in another way.
    """
    data = load_ray("ray.data", "a batch on Ray")
    from ray.data.checkpoint import CheckpointConfig

    folder = Path(output).resolve()
    _question_ids(questions, id_column)
    folder.mkdir(parents=True, exist_ok=True)
    _check_settings(folder / SETTINGS, _settings(processor.answers, id_column))
    dataset = data.read_parquet(str(questions))
    dataset.context.checkpoint_config = CheckpointConfig(
        id_column,
        str(folder / CHECKPOINT),
        delete_checkpoint_on_success=False,  # a job that is called once more finds nothing to do
    )
    answered = processor(dataset.repartition(target_num_rows_per_block=rows_per_file))
    answered.write_parquet(str(folder / PARTS))


def read_answers(questions: str | Path, output: str | Path, *, id_column: str = "id") -> pa.Table:
    """The answers of a finished job, in the order of its questions.

    Raises:
        RequestError: questions have no answers yet, or several.
    """
    pyarrow = load_package("pyarrow", "a batch on Ray", "ray", RequestError)
    dataset = load_package("pyarrow.dataset", "a batch on Ray", "ray", RequestError)
    wanted = _question_ids(questions, id_column)
    answers = dataset.dataset(str(Path(output) / PARTS), format="parquet").to_table()
    places = {value: place for place, value in enumerate(answers[id_column].to_pylist())}
    missing = sum(value not in places for value in wanted)
    if missing or len(answers) != len(wanted):
        raise RequestError(
            f"{output}: {len(answers)} answers, of {len(wanted)} questions {missing} have none: expected one for each; "
            "call answer_parquet again"
        )
    return answers.take(pyarrow.array([places[value] for value in wanted]))


def _question_ids(questions: str | Path, id_column: str) -> list[Any]:
    """The ids of all questions.

    Raises:
        RequestError: the column is missing, or an id is null or stands twice.
    """
    dataset = load_package("pyarrow.dataset", "a batch on Ray", "ray", RequestError)
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


def _check_settings(path: Path, wanted: dict[str, Any]) -> None:
    """Writes what a job's answers depend on, or compares it with what an earlier call has written.

    Raises:
        RequestError: they differ.
    """
    if not path.exists():
        path.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
        return
    found = json.loads(read_file(path, RequestError, SETTINGS_BYTES))
    names = [name for name in wanted if found.get(name) != wanted[name]]
    if names:
        first, second = (", ".join(f"{name}={each.get(name)}" for name in names) for each in (found, wanted))
        raise RequestError(f"{path.parent}: has answers of {first}, expected {second}: choose another folder")
