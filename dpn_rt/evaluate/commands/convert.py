"""`evaluate convert`: answers to a file for a benchmark's server."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from dpn_rt.errors import EvaluationError


def add_parser(commands: Any) -> None:
    """Adds the command to a parser's commands."""
    parser = commands.add_parser(
        "convert",
        help="make a submission file",
        description="Make the file that a benchmark's server takes: mmbench (.xlsx), mmvet, vizwiz or vqav2 (.json).",
    )
    parser.set_defaults(run=run)
    parser.add_argument("benchmark", metavar="BENCHMARK", help="mmbench, mmvet, vizwiz or vqav2")
    parser.add_argument(
        "--answers-file", type=Path, nargs="+", action="extend", required=True, metavar="FILE", help="one, or chunks"
    )
    parser.add_argument(
        "--question-file", type=Path, required=True, metavar="FILE", help="of the split, that was answered"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="to be submitted")


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from dpn_rt.evaluate.scorers.truth import good_rows, read_answers
    from dpn_rt.evaluate.submissions import SUBMISSIONS
    from dpn_rt.evaluate.writing import check_target, write_whole

    make = SUBMISSIONS.get(options.benchmark)
    if make is None:
        raise EvaluationError(f"benchmark {options.benchmark!r:.100}: expected {', '.join(SUBMISSIONS)}")
    check_target(options.output)
    answers = [answer for path in options.answers_file for answer in read_answers(path)]
    write_whole(options.output, make(answers, options.question_file))
    num_questions = sum(1 for _ in good_rows(options.question_file))
    num_answered = len({answer.question_id for answer in answers})
    print(f"{options.output}: {min(num_answered, num_questions)} answers to {num_questions} questions", flush=True)
    if num_answered < num_questions:
        print(f"  {num_questions - num_answered} questions have no answer", file=sys.stderr)
    return 0
