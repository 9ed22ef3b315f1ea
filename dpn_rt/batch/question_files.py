"""The parquet files of questions, and the ids by which their answers are found."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpn_rt.batch.actor_pool import PURPOSE
from dpn_rt.batch.options import AnswerOptions
from dpn_rt.errors import RequestError
from dpn_rt.schema.packages import load_package

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.dataset as ds


def open_parquet(path: str | Path | list[str], name: str) -> ds.Dataset:
    """The rows of a parquet file, of the files of a folder, or of several files.

    Args:
        path: of them.
        name: for messages.

    Raises:
        RequestError: there is none, or one is no parquet file.
    """
    pyarrow = load_package("pyarrow", PURPOSE, "ray", RequestError)
    dataset = load_package("pyarrow.dataset", PURPOSE, "ray", RequestError)
    try:
        found: ds.Dataset = dataset.dataset(path if isinstance(path, list) else str(path), format="parquet")
    except FileNotFoundError:
        raise RequestError(f"{name}: no such file or folder, expected parquet files") from None
    except (OSError, pyarrow.ArrowException) as error:  # a file that is damaged is an OSError as well
        unreadable = "not a parquet file, damaged, or with two columns of one name"
        reason = error.strerror if isinstance(error, OSError) and error.strerror else unreadable
        raise RequestError(f"{name}: {reason}, expected parquet files") from error
    if not found.files:
        raise RequestError(f"{name}: has no files, expected parquet files")
    return found


def question_ids(questions: ds.Dataset, name: str, id_column: str) -> list[int | str]:
    """The ids of all questions, in their order.

    Args:
        questions: as `open_parquet` gives them.
        name: of them, for messages.
        id_column: of theirs.

    Raises:
        RequestError: they are neither whole numbers nor texts, or one is null or stands twice.
    """
    _check_type(questions.schema.field(id_column), name)
    ids: list[Any] = read_columns(questions, name, [id_column])[id_column].to_pylist()
    seen: set[Any] = set()
    for value in ids:
        if value is None or value in seen:
            raise RequestError(f"{name}: {id_column}={value!r:.200}, expected every id once, and none of them null")
        seen.add(value)
    return ids


def check_texts(
    questions: ds.Dataset, name: str, answered: pa.Table, folder: Path, options: AnswerOptions, id_column: str
) -> None:
    """Refuses questions whose ids have answers to other texts.

    Args:
        questions: as `open_parquet` gives them.
        name: of them, for messages.
        answered: ids and questions that have answers.
        folder: that has the answers, for messages.
        options: of the answers.
        id_column: of both.

    Raises:
        RequestError: with the first of them.
    """
    import pyarrow
    import pyarrow.compute as pc

    text = options.question_column
    if not len(answered):
        return
    asked = read_columns(questions, name, [id_column, text])
    if not answered[id_column].type.equals(asked[id_column].type):
        raise RequestError(
            f"{folder}: has answers whose {id_column} is {answered[id_column].type}, and that of {name} is "
            f"{asked[id_column].type}: choose another folder"
        )
    place = pc.index_in(answered[id_column], value_set=asked[id_column].combine_chunks())
    known = pc.is_valid(place)
    kind = pyarrow.large_string()
    before, now = answered[text].filter(known).cast(kind), asked[text].cast(kind).take(place.filter(known))
    differs = pc.fill_null(pc.not_equal(before, now), False)
    if pc.any(differs).as_py():
        ids = answered[id_column].filter(known).filter(differs)
        raise RequestError(
            f"{folder}: {id_column}={ids[0].as_py()!r:.200} was answered when {text} was "
            f"{before.filter(differs)[0].as_py()!r:.200}, and it is {now.filter(differs)[0].as_py()!r:.200}: choose "
            "another folder"
        )


def read_columns(questions: ds.Dataset, name: str, columns: list[str] | None) -> pa.Table:
    """Columns of parquet files; None: all.

    Raises:
        RequestError: a file is damaged, or its columns have other types than those of the others.
    """
    pyarrow = load_package("pyarrow", PURPOSE, "ray", RequestError)
    try:
        return questions.to_table(columns=columns)
    except (OSError, pyarrow.ArrowException) as error:
        for fragment in questions.get_fragments():
            try:
                fragment.to_table(columns=columns, schema=questions.schema)
            except (OSError, pyarrow.ArrowException):
                raise RequestError(
                    f"{name}: {fragment.path} is damaged, or its columns are not those of the other files; expected "
                    "parquet files of one form"
                ) from error
        raise RequestError(f"{name}: cannot be read, expected parquet files of one form") from error


def check_text_column(questions: ds.Dataset, name: str, column: str) -> None:
    """Refuses a column of questions that are no texts.

    Raises:
        RequestError: naming its type.
    """
    import pyarrow.types as types

    kind = questions.schema.field(column).type
    if not (types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)):
        raise RequestError(f"{name}: column {column!r} is {kind}, expected texts (string)")


def _check_type(field: pa.Field, name: str) -> None:
    import pyarrow.types as types

    if not (types.is_integer(field.type) or types.is_string(field.type) or types.is_large_string(field.type)):
        raise RequestError(
            f"{name}: column {field.name!r} is {field.type}, expected ids that are whole numbers or texts"
        )
