"""Questions per second of `evaluate run` against `LLM.chat` on the same list, the two in turn.

python -m benchmarks.evaluate --engine DIR --scenes 40 --repeats 5

Both ask held-out questions of the small trained model about pictures in files; answers must be the same.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from benchmarks.measuring.machine import machine
from benchmarks.measuring.result_file import write_json
from dpn_rt import LLM, SamplingParams
from dpn_rt.evaluate.answers_file import AnswersFile
from dpn_rt.evaluate.asking import Run, answers_of
from dpn_rt.evaluate.question_format import QuestionFormat
from dpn_rt.evaluate.settings import RunSettings
from dpn_rt.evaluate.source import QuestionSource, Scan
from dpn_rt.terminal import escape_output
from examples.tiny_dpn.answers import MAX_TOKENS, chat_messages
from examples.tiny_dpn.export_questions import export

LEAST_RATIO = 0.95


def by_chat(llm: LLM, source: QuestionSource) -> list[str]:
    """The answers of one call with the whole list."""
    rows = [json.loads(line) for line in source.path.read_text(encoding="utf-8").splitlines()]
    conversations = [chat_messages(source.image_folder / row["image"], row["text"]) for row in rows]
    outputs = llm.chat(conversations, SamplingParams(temperature=0, max_tokens=MAX_TOKENS))
    return [output.outputs[0].text.strip() for output in outputs]


def by_run(llm: LLM, source: QuestionSource, answers_file: Path) -> list[str]:
    """The answers of `evaluate run`, from the first look at the question file to the arranged answers file."""
    answers_file.unlink(missing_ok=True)
    settings = RunSettings("benchmark", max_new_tokens=MAX_TOKENS)
    scan = Scan.of(source)
    with AnswersFile(answers_file, settings.to_json(), scan.places) as file:
        run = Run(QuestionFormat(settings, "benchmark"), file, scan)
        for _, answer in answers_of(llm, source, [run]):
            run.take(answer)
        file.arrange()
    assert not run.outcome.skipped, run.outcome.skipped[0]
    return [json.loads(line)["text"] for line in answers_file.read_text(encoding="utf-8").splitlines()]


def measure(engine: Path, folder: Path, scenes: int, repeats: int) -> dict[str, object]:
    """Seconds of both, round by round."""
    source = QuestionSource(export(folder, scenes), folder / "images")
    llm = LLM(engine)
    ways = {"chat": lambda: by_chat(llm, source), "evaluate": lambda: by_run(llm, source, folder / "answers.jsonl")}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    processor: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, list[str]] = {}
    for number in range(repeats + 1):
        for name in list(ways)[:: 1 if number % 2 else -1]:
            start, busy = time.perf_counter(), time.process_time()
            answers[name] = ways[name]()
            if number:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - busy)
    questions = 10 * scenes
    medians = {name: median(values) for name, values in seconds.items()}
    return {
        "machine": machine("cpu"),
        "questions": questions,
        "per_second": {name: questions / value for name, value in medians.items()},
        "ratio": ratio(seconds),
        "ratio_of_processor_time": ratio(processor),  # says more than `ratio` where the machine is busy
        "same_answers": sum(a == b for a, b in zip(answers["chat"], answers["evaluate"], strict=True)) / questions,
        "seconds": seconds,
    }


def ratio(seconds: dict[str, list[float]]) -> float:
    """Median over the rounds: above 1 `evaluate run` is faster."""
    return median(chat / run for chat, run in zip(seconds["chat"], seconds["evaluate"], strict=True))


def main() -> int:
    """Run the command and return its exit status: 1 where a bar is missed."""
    escape_output()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluate", description=__doc__.split("\n\n")[0])
    parser.add_argument("--engine", type=Path, required=True, metavar="DIR", help="of the small trained model")
    parser.add_argument("--scenes", type=int, default=40, metavar="N", help="ten questions each (default 40)")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds (default 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result there too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.engine, Path(folder), options.scenes, options.repeats)
    text = json.dumps(result, indent=1)
    print(text)
    if options.json is not None:
        write_json(options.json, result)
    is_met = result["ratio"] >= LEAST_RATIO and result["same_answers"] == 1
    print(f"{'met' if is_met else 'MISSED'}: {LEAST_RATIO} of LLM.chat, and the same answers")
    return 0 if is_met else 1


if __name__ == "__main__":
    sys.exit(main())
