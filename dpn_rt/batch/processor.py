"""A step of a Ray Data pipeline that answers questions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpn_rt.batch.options import AnswerOptions
from dpn_rt.errors import ConfigError
from dpn_rt.format.engine_dir import EngineDir
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
    actors: int | tuple[int, int]
    """Each with an engine; or the fewest and the most, by how many rows wait."""
    batch_size: int
    """Rows that an engine gets at a time."""
    cpus_per_actor: float
    gpus_per_actor: float

    def __call__(self, dataset: Dataset) -> Dataset:
        """The dataset with answers: see `Answerer`."""
        data = load_ray("ray.data", "a batch on Ray")
        from dpn_rt.batch.answering import Answerer

        return dataset.map_batches(
            Answerer,
            fn_constructor_args=(self.answers,),
            batch_size=self.batch_size,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=data.ActorPoolStrategy(**self._pool),
            num_cpus=self.cpus_per_actor,
            num_gpus=self.gpus_per_actor or None,
        )

    @property
    def _pool(self) -> dict[str, int]:
        if isinstance(self.actors, int):
            return {"size": self.actors}
        return {"min_size": self.actors[0], "max_size": self.actors[1]}


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
    fewest, most = (actors, actors) if isinstance(actors, int) else actors
    if not 1 <= fewest <= most:
        raise ConfigError(f"actors={actors}: expected at least 1, or the fewest and the most")
    if batch_size < 1:
        raise ConfigError(f"batch_size={batch_size}: expected at least 1")
    for name, value in (("cpus_per_actor", cpus_per_actor), ("gpus_per_actor", gpus_per_actor)):
        if value < 0:
            raise ConfigError(f"{name}={value}: expected at least 0")
    path = Path(engine).resolve()
    EngineDir.open(path, verify=False)  # told here: Ray would start its actors again and again
    answers = AnswerOptions(
        path, sampling_params, image_column, question_column, route, router_bias, reduce, llm_options
    )
    return Processor(answers, actors, batch_size, cpus_per_actor, gpus_per_actor)
