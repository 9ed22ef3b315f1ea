"""A step of a Ray Data pipeline that answers questions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpn_rt.batch.actor_pool import ActorPool
from dpn_rt.batch.options import AnswerOptions
from dpn_rt.sampling.params import SamplingParams
from dpn_rt.schema.packages import load_ray

if TYPE_CHECKING:
    from ray.data import Dataset

GREEDY = SamplingParams(temperature=0.0, max_tokens=128, logprobs=0)
"""What is taken where no sampling parameters are given; with the log-probabilities of the answer's own tokens."""


@dataclass(frozen=True)
class Processor:
    """Adds answers to a dataset of questions. Called with a dataset it gives another one.

    That is computed when it is read or written: no faster than its reader takes it, so that what waits fits into Ray's
    memory. An actor that dies is started again, with the rows that it had.
    """

    answers: AnswerOptions
    pool: ActorPool

    def __call__(self, dataset: Dataset) -> Dataset:
        """The dataset with answers: see `Answerer`."""
        from dpn_rt.batch.answering import Answerer

        return self.pool.map(dataset, Answerer, self.answers)


def build_processor(
    engine: str | Path,
    sampling_params: SamplingParams = GREEDY,
    *,
    actors: int | tuple[int, int] = 1,
    batch_size: int = 64,
    cpus_per_actor: float = 1.0,
    gpus_per_actor: float = 0.0,
    image_column: str = "image",
    question_column: str = "question",
    route: tuple[int | None, ...] | None = None,
    router_bias: float | None = None,
    reduce: str | None = None,
    **llm_options: Any,
) -> Processor:
    """A step of Ray Data that answers questions about images.

    Example:
        >>> processor = build_processor("engine", actors=2)
        >>> processor(ray.data.read_parquet("questions.parquet")).write_parquet("answers")

    Args:
        engine: directory of the engine, the same on all machines.
        sampling_params: for all questions.
        actors: how many engines there are, or the fewest and the most.
        batch_size: rows that an engine gets at a time. A larger batch keeps it busier, since it waits for the last
            answer before it begins the next; `max_num_seqs` of them run at a time.
        cpus_per_actor: cores, and threads, of an engine.
        gpus_per_actor: GPUs of an engine.
        image_column: see `Answerer`.
        question_column: see `Answerer`.
        route: as in `LLM.chat`, for all questions.
        router_bias: as in `LLM.chat`, for all questions.
        reduce: as in `LLM.chat`, for all questions.
        llm_options: further arguments of `LLM`.

    Raises:
        ConfigError: a number is out of range, or Ray is not installed; EngineError: there is no engine.
    """
    load_ray("ray.data", "a batch on Ray")
    from dpn_rt.format.engine_dir import EngineDir  # imports torch, which tasks that read and write do without

    pool = ActorPool(actors, batch_size, cpus_per_actor, gpus_per_actor)
    path = Path(engine).resolve()
    EngineDir.open(path, verify=False)  # told here: Ray would start its actors again and again
    answers = AnswerOptions(
        path, sampling_params, image_column, question_column, route, router_bias, reduce, llm_options
    )
    return Processor(answers, pool)
