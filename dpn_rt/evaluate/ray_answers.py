"""Answers of engines in the actors of a Ray cluster: `evaluate run --ray`."""

from __future__ import annotations

import math
import pickle
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from dpn_rt.batch.actor_pool import ActorPool
from dpn_rt.engine.loader import load_processor
from dpn_rt.errors import ConfigError, EngineError
from dpn_rt.evaluate.asking import Answer, Run, ask
from dpn_rt.evaluate.engine_choice import EngineChoice
from dpn_rt.evaluate.question_format import QuestionFormat
from dpn_rt.evaluate.ray_questions import open_questions
from dpn_rt.evaluate.source import QuestionSource
from dpn_rt.memory import telling_memory
from dpn_rt.ray_cluster import RayCluster, check_room, check_share, copies_weights, own_message
from dpn_rt.schema.files import real_path
from dpn_rt.schema.packages import load_ray
from dpn_rt.settings import EngineOptions

if TYPE_CHECKING:
    import pyarrow as pa

PURPOSE = "python -m dpn_rt.evaluate run --ray"


@dataclass(frozen=True)
class RayEngines:
    """How many engines answer, and where.

    Raises:
        ConfigError: Ray is not installed, or a number is out of range.
    """

    replicas: int = 1
    cpus_per_replica: float = 1.0
    gpus_per_replica: float = 0.0
    address: str | None = None
    """Of a running cluster; None: $RAY_ADDRESS, or a new one here."""

    def __post_init__(self) -> None:
        load_ray("ray", PURPOSE)
        if self.replicas < 1:
            raise ConfigError(f"--replicas {self.replicas}: expected at least 1")
        for name in ("cpus_per_replica", "gpus_per_replica"):
            value = getattr(self, name)
            check_share(f"--{name.replace('_', '-')} {value:g}", value)

    def answers(
        self, engine: EngineChoice, source: QuestionSource, runs: Sequence[Run]
    ) -> Generator[tuple[Run, Answer], None, None]:
        """As `asking.answers_here`: all runs go through the same engines.

        Raises:
            DpnError: there is no room for the engines, they cannot be loaded, refuse the settings of a run, or stop.
        """
        settings = [run.format.settings for run in runs]
        limits = EngineOptions(reduce=engine.reduce(settings), max_num_seqs=engine.max_num_seqs)
        processor = load_processor(engine.path, engine.device, limits, verify=False)
        for run in runs:
            run.format.check(processor)
        # Other processes, and other machines, have other working directories.
        copies = copies_weights(engine.copy_weights, self.replicas)
        engine = replace(engine, path=real_path(engine.path), copy_weights=copies)
        source = replace(source, path=real_path(source.path), image_folder=real_path(source.image_folder))
        with RayCluster(self.address).connected(PURPOSE) as ray:
            check_room(ray, f"{self.replicas} replicas", self.replicas, self._asked("cpus"), self._asked("gpus"))
            pool = self._pool(engine, sum(run.num_open for run in runs))
            if reason := pool.takes_all_cores():
                raise ConfigError(f"--replicas {self.replicas}: {reason}")
            try:
                for table in _tables(pool, engine, source, runs):
                    for number, answer in zip(table["run"].to_pylist(), table["answer"].to_pylist(), strict=True):
                        yield runs[number], pickle.loads(answer)
            except ray.exceptions.RayError as error:
                told = own_message(error) or "the lines above say why"
                raise EngineError(f"the engines on Ray cannot answer: {told}") from error

    def _asked(self, resource: str) -> tuple[str, float]:
        """How cores or GPUs of an engine were asked for, and how many."""
        each: float = getattr(self, f"{resource}_per_replica")
        return f"--{resource}-per-replica {each:g}", each

    def _pool(self, engine: EngineChoice, num_open: int) -> ActorPool:
        """An engine gets two batches of its own at a time, or less where all could not work: a kill loses no more."""
        size = min(2 * engine.max_num_seqs, math.ceil(num_open / self.replicas))
        return ActorPool(self.replicas, size, self.cpus_per_replica, self.gpus_per_replica)


def _tables(pool: ActorPool, engine: EngineChoice, source: QuestionSource, runs: Sequence[Run]) -> Iterator[pa.Table]:
    """Tables of answers as they come, with columns `run` (number) and `answer` (pickled)."""
    data = load_ray("ray.data", PURPOSE)
    context = data.DataContext.get_current().copy()
    context.enable_progress_bars = False  # the command has its own
    with data.DataContext.current(context):
        read = partial(
            open_questions, source=source, done=[run.file.keys() for run in runs], batch_size=pool.batch_size
        )
        numbers = data.from_items([{"run": number} for number in range(len(runs))], override_num_blocks=1)
        questions = numbers.map_batches(read, batch_size=None, batch_format="pyarrow")
        # One block a task: else the questions of a file would be one task of one engine.
        questions = questions.repartition(target_num_rows_per_block=pool.batch_size)
        answers = pool.map(questions, EngineActor, engine, [run.format for run in runs])
        yield from answers.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0)


class EngineActor:
    """An engine that answers the questions of tables."""

    def __init__(self, engine: EngineChoice, formats: Sequence[QuestionFormat]) -> None:
        """Loads the engine.

        Raises:
            DpnError: as `LLM`; also for lack of memory.
        """
        with telling_memory(engine.path):
            self._llm = engine.load([each.settings for each in formats])
        self._formats = formats

    def __call__(self, table: pa.Table) -> pa.Table:
        """Replaces questions by answers, in the same order.

        Raises:
            DeviceError: the engine has stopped.
        """
        import pyarrow

        numbers, questions = table["run"].to_pylist(), table["question"].to_pylist()
        asked = [
            (self._formats[number], pickle.loads(question)) for number, question in zip(numbers, questions, strict=True)
        ]
        answers: list[bytes] = [b""] * len(asked)
        for position, answer in ask(self._llm, asked):
            answers[position] = pickle.dumps(answer)
        return pyarrow.table({"run": table["run"], "answer": pyarrow.array(answers, pyarrow.binary())})
