"""GQA: compositional questions. https://arxiv.org/abs/1902.09506, the accuracy of its evaluation.

The answer in lower case, without periods at its end, is right where it equals the one of the data. Only questions of
the balanced set count. Questions of the structural type "query" are open, all others binary.

Annotations: `testdev_balanced_questions.json`, or rows with `answer`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from dpn_rt.evaluate.scorers.benchmark import Benchmark
from dpn_rt.evaluate.scorers.exact import truth_of_row
from dpn_rt.evaluate.scorers.truth import Answer, Inputs, Truth, good_rows


def read(inputs: Inputs) -> list[Truth]:
    """The answers of the balanced set."""
    truths = []
    for row in good_rows(inputs.annotations):
        if row.values.get("isBalanced", True):
            truth = truth_of_row(row, str(inputs.annotations))
            types = row.values.get("types")
            if isinstance(types, dict) and "structural" in types:
                truth = replace(truth, category="open" if types["structural"] == "query" else "binary")
            truths.append(truth)
    return truths


def grade(truth: Truth, answers: Sequence[Answer]) -> float:
    """1 where the answer is the one of the data."""
    return float(answers[0].text.rstrip(".").lower() == truth.answers[0])


BENCHMARK = Benchmark("GQA", read, grade)
