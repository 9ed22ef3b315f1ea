"""Answer 2,000 questions of a parquet file on Ray: python -m examples.answer_parquet DIR [--questions N] [--actors N].

DIR gets engine/ (the small trained model), questions.parquet (id, image, question, right answer) and job/ (answers).
Stop it at any time and call it again: it goes on where it stopped. At the end it prints the share of right answers for
each kind of question, and of FLOPs that the pyramid saved.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from dpn_rt.batch import answer_parquet, build_processor, read_answers
from dpn_rt.builders.native import build_engine
from dpn_rt.errors import DpnError
from dpn_rt.terminal import count, escape_output
from examples.tiny_dpn.data import KINDS, sample

CHECKPOINT = Path(__file__).parent / "tiny_dpn" / "checkpoint"


def write_questions(path: Path, count: int) -> None:
    """Questions about held-out scenes, ten each."""
    rows = []
    for number in range(count):
        scene, kind = divmod(number, len(KINDS))
        if kind == 0:
            item, file = sample("test", scene), io.BytesIO()
            item.image.save(file, "PNG")
        question = item.questions[kind]
        rows.append(
            {
                "id": number,
                "image": file.getvalue(),
                "question": question.text,
                "kind": question.kind,
                "right_answer": question.answer,
            }
        )
    pq.write_table(pa.Table.from_pylist(rows), path)


def summary(answers: pa.Table) -> str:
    """Right answers by kind of question, and saved FLOPs."""
    rows = answers.to_pylist()
    lines = []
    for kind in KINDS:
        right = [
            row["answer"] is not None and row["answer"].strip() == row["right_answer"]
            for row in rows
            if row["kind"] == kind
        ]
        lines.append(f"{kind:12} {sum(right):5} of {len(right)}")
    dense = sum(row["dense_prefill_flops"] for row in rows if row["error"] is None)
    computed = sum(row["prefill_flops"] for row in rows if row["error"] is None)
    saved = 1 - computed / dense if dense else 0.0
    failed = sum(row["error"] is not None for row in rows)
    return "\n".join([*lines, f"{saved:.0%} of the prefills' FLOPs saved; {failed} questions without an answer"])


def main(arguments: Sequence[str] | None = None) -> int:
    escape_output()
    parser = argparse.ArgumentParser(description="Answer questions of a parquet file on Ray.")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--questions", type=count, default=2000, metavar="N")
    parser.add_argument("--actors", type=count, default=1, metavar="N", help="engines, each with one core")
    options = parser.parse_args(arguments)
    engine, questions, job = (options.folder / name for name in ("engine", "questions.parquet", "job"))
    options.folder.mkdir(parents=True, exist_ok=True)
    try:
        if not engine.exists():
            build_engine(CHECKPOINT, engine, dtype="float32")
        if not questions.exists():
            write_questions(questions, options.questions)
        answer_parquet(questions, job, build_processor(engine, actors=options.actors, batch_size=128))
        print(summary(read_answers(questions, job)))
    except DpnError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
