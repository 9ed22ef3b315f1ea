"""`evaluate run`: questions to answers."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpn_rt.errors import EvaluationError
from dpn_rt.evaluate.commands.score import Truths, print_scores, read_truths

if TYPE_CHECKING:
    from dpn_rt.evaluate.ray_answers import RayEngines
    from dpn_rt.evaluate.runs import RunResult

SKIPPED = 3
"""Exit status where rows were skipped."""
SHOWN_ROWS = 5


def add_parser(commands: Any) -> None:
    """Adds the command to a parser's commands."""
    parser = commands.add_parser(
        "run",
        help="answer the questions of a file",
        description="Answer the questions of a file. A run that was killed goes on where it was.",
    )
    parser.set_defaults(run=run)
    _add_files(parser)
    _add_prompts(parser)
    _add_settings(parser)
    _add_ray(parser)
    parser.add_argument("--device", default="auto", help="cpu, cuda or auto (default)")
    parser.add_argument("--max-num-seqs", type=int, default=64, metavar="N", help="questions at one time (default 64)")
    parser.add_argument(
        "--reuse-bytes", type=int, default=0, metavar="N", help="memory for images that come again (default 0)"
    )
    parser.add_argument(
        "--tensor-parallel-size", type=int, default=1, metavar="N", help="processes that share the decoder (default 1)"
    )
    parser.add_argument("--skip-verify", action="store_true", help="load without comparing the files' sha256")
    parser.add_argument("--quiet", action="store_true", help="no progress bar")


def _add_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", type=Path, required=True, metavar="DIR", help="engine made by dpn_rt.build")
    parser.add_argument(
        "--question-file", type=Path, required=True, metavar="FILE", help=".jsonl, .json, .csv, .tsv or .parquet"
    )
    parser.add_argument("--image-folder", type=Path, default=Path(), metavar="DIR", help="of images (default here)")
    parser.add_argument("--answers-file", type=Path, required=True, metavar="FILE", help=".jsonl, made or gone on with")
    parser.add_argument("--num-chunks", type=int, default=1, metavar="N", help="parts of the question file (default 1)")
    parser.add_argument("--chunk-idx", type=int, default=0, metavar="I", help="the part to answer, from 0")
    parser.add_argument("--score", metavar="BENCHMARK", help="score the answers at the end, see `score --help`")
    parser.add_argument("--annotations", type=Path, metavar="PATH", help="for --score (default the question file)")


def _add_prompts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--conv-mode", metavar="NAME", help="vicuna_v1 or llava_v1 (default the engine's template)")
    parser.add_argument(
        "--single-pred-prompt", action="store_true", help="ask for the letter of an option, as LLaVA does"
    )
    parser.add_argument("--all-rounds", action="store_true", help="ask once for each rotation of a question's options")
    parser.add_argument("--lang", choices=("en", "cn"), default="en", help="of --single-pred-prompt (default en)")
    parser.add_argument("--post-prompt", default="", metavar="TEXT", help="added to each question on a line of its own")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token (default)")
    parser.add_argument("--top_p", "--top-p", type=float, default=1.0, help="sample from this probability mass")
    parser.add_argument(
        "--max_new_tokens", "--max-new-tokens", type=int, default=1024, metavar="N", help="of an answer (default 1024)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    parser.add_argument("--reduce", metavar="SPEC", help="training-free reduction, e.g. fastv:k=2,ratio=0.5, or none")
    parser.add_argument("--router-bias", type=float, metavar="X", help="above 0 faster, below 0 more accurate")
    parser.add_argument("--route", metavar="E,E,E", help="forced expert per boundary, e.g. 2,none,1")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="NAME=VALUES",
        help="one answers file a value: router_bias=-4,0,4 or 'reduce=none;fastv:k=2,ratio=0.5' or 'route=0,0,0;2,2,2'",
    )


def _add_ray(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("several engines").add_argument
    add("--ray", action="store_true", help="engines in the actors of a Ray cluster, or of one on this machine alone")
    add("--replicas", type=int, metavar="N", help="engines (default 1)")
    add("--cpus-per-replica", type=float, metavar="X", help="cores, and threads, of an engine (default 1)")
    add("--gpus-per-replica", type=float, metavar="X", help="GPUs of an engine (default 0)")
    add("--ray-address", metavar="ADDRESS", help="running cluster (default $RAY_ADDRESS, or a new one here)")


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    if options.num_chunks < 1:
        raise EvaluationError(f"--num-chunks {options.num_chunks}: expected at least 1")
    if not 0 <= options.chunk_idx < options.num_chunks:
        raise EvaluationError(
            f"--chunk-idx {options.chunk_idx} of --num-chunks {options.num_chunks}: "
            f"expected 0 to {options.num_chunks - 1}"
        )
    if options.annotations is not None and options.score is None:
        raise EvaluationError(f"--annotations {options.annotations}: expected --score as well")
    _check_ray(options)
    # Imported here: --help and a wrong option should not wait for torch.
    from dpn_rt.evaluate.asking import answers_here
    from dpn_rt.evaluate.engine_choice import EngineChoice
    from dpn_rt.evaluate.question import PromptStyle
    from dpn_rt.evaluate.runs import run_all
    from dpn_rt.evaluate.settings import RunSettings, Sweep, parse_route
    from dpn_rt.evaluate.source import QuestionSource

    # What is wrong with name or annotations is told before anything is computed.
    truths = None if options.score is None else _truths(options)
    settings = RunSettings(
        engine="",
        temperature=options.temperature,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        seed=options.seed,
        conv_mode=options.conv_mode,
        reduce=options.reduce,
        router_bias=options.router_bias,
        route=None if options.route is None else parse_route(options.route),
    )
    style = PromptStyle(options.single_pred_prompt, options.all_rounds, options.lang, options.post_prompt)
    results = run_all(
        EngineChoice(
            options.engine,
            options.device,
            options.max_num_seqs,
            options.reuse_bytes,
            not options.skip_verify,
            options.tensor_parallel_size,
        ),
        QuestionSource(options.question_file, options.image_folder, style, options.num_chunks, options.chunk_idx),
        settings,
        options.answers_file,
        [Sweep.parse(text) for text in options.sweep],
        answers=_ray_engines(options).answers if options.ray else answers_here,
        use_tqdm=not options.quiet,
    )
    _tell(results)
    if truths is not None:
        print_scores(truths, [result.answers_file for result in results], as_json=False)
    return SKIPPED if any(result.outcome.skipped for result in results) else 0


def _check_ray(options: argparse.Namespace) -> None:
    """Refuses options that do not go together.

    Raises:
        EvaluationError: naming them.
    """
    names = ("replicas", "cpus_per_replica", "gpus_per_replica", "ray_address")
    given = [name for name in names if getattr(options, name) is not None]
    if given and not options.ray:
        raise EvaluationError(f"--{given[0].replace('_', '-')}: expected --ray as well")
    if not options.ray:
        return
    if options.tensor_parallel_size != 1:
        raise EvaluationError(
            f"--ray with --tensor-parallel-size {options.tensor_parallel_size}: expected 1, "
            "an engine on Ray is one process"
        )
    if options.device == "cuda" and not options.gpus_per_replica:
        raise EvaluationError("--ray with --device cuda: expected --gpus-per-replica as well, Ray gives out the GPUs")
    if options.device == "cpu" and options.gpus_per_replica:
        raise EvaluationError(
            f"--gpus-per-replica {options.gpus_per_replica:g} with --device cpu: expected one of the two"
        )


def _ray_engines(options: argparse.Namespace) -> RayEngines:
    from dpn_rt.evaluate.ray_answers import RayEngines

    names = {"replicas": "replicas", "cpus_per_replica": "cpus_per_replica", "gpus_per_replica": "gpus_per_replica"}
    names["address"] = "ray_address"
    given = {name: getattr(options, option) for name, option in names.items()}
    return RayEngines(**{name: value for name, value in given.items() if value is not None})


def _tell(results: Sequence[RunResult]) -> None:
    for result in results:
        outcome = result.outcome
        print(f"{result.answers_file}: {result.num_answers} answers, {outcome.answered} of them new", flush=True)
        if outcome.cut:
            print(f"  {outcome.cut} answers were cut at {result.settings.max_new_tokens} tokens (--max_new_tokens)")
        if outcome.skipped:
            print(f"  {len(outcome.skipped)} rows were skipped, listed in {result.skipped_file}:", file=sys.stderr)
            for row in outcome.skipped[:SHOWN_ROWS]:
                print(f"    {row}", file=sys.stderr)
            more = len(outcome.skipped) - SHOWN_ROWS
            if more > 0:
                print(f"    and {more} more", file=sys.stderr)


def _truths(options: argparse.Namespace) -> Truths:
    from dpn_rt.evaluate.scorers.truth import Inputs

    return read_truths(options.score, Inputs(options.annotations or options.question_file, options.question_file))
