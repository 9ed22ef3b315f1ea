"""A step of a Ray Data pipeline that answers questions."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpn_rt.batch.actor_pool import ActorPool
from dpn_rt.batch.options import AnswerOptions
from dpn_rt.errors import ConfigError
from dpn_rt.ray_cluster import copies_weights
from dpn_rt.sampling.params import SamplingParams
from dpn_rt.schema.files import real_path
from dpn_rt.schema.packages import load_ray
from dpn_rt.schema.text import shown

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
        llm_options: further arguments of `LLM`. Several engines share the weights' file, unless `copy_weights=True`.

    Raises:
        ConfigError: an argument is unknown, of the wrong type or out of range, or Ray is not installed; EngineError:
            there is no engine; RequestError: the engine cannot serve `route`, `router_bias` or `reduce`.
    """
    load_ray("ray.data", "a batch on Ray")
    pool = ActorPool(actors, batch_size, cpus_per_actor, gpus_per_actor)
    _check_sampling(sampling_params)
    llm_options["copy_weights"] = copies_weights(llm_options.get("copy_weights"), pool.most)
    _check_engine(engine, llm_options, route=route, router_bias=router_bias, reduce=reduce)
    answers = AnswerOptions(
        real_path(engine),
        sampling_params,
        image_column,
        question_column,
        route,
        router_bias,
        reduce,
        llm_options,
    )
    return Processor(answers, pool)


def _check_sampling(params: SamplingParams) -> None:
    if not isinstance(params, SamplingParams):
        raise ConfigError(f"sampling_params={shown(params)}: expected SamplingParams")
    if params.n != 1:
        raise ConfigError(f"sampling_params.n={params.n}: expected 1, a row has one answer")


def _check_engine(engine: str | Path, llm_options: Mapping[str, Any], **choice: Any) -> None:
    """Refuses what no engine could be loaded with, or no row answered. Ray would start its actors again and again.

    Args:
        engine: directory.
        llm_options: of `LLM`.
        choice: how rows are reduced, as of a prompt.
    """
    from dpn_rt.engine.loader import load_processor  # imports torch, which tasks that read and write do without
    from dpn_rt.llm import LLM
    from dpn_rt.settings import EngineOptions

    own = {"engine_dir", "reduce"}
    known = [name for name in inspect.signature(LLM).parameters if name not in own]
    for name in llm_options:
        if name not in known:
            raise ConfigError(
                f"build_processor has no argument {name!r:.80}: expected one of LLM's, {', '.join(known)}"
            )
    limits = {name: value for name, value in llm_options.items() if name not in ("device", "verify")}
    options = EngineOptions(reduce=choice["reduce"], **limits)
    processor = load_processor(engine, llm_options.get("device", "auto"), options, verify=False)
    processor.process({"prompt_token_ids": [0], **choice})
