"""Actors of Ray Data, each of which holds an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dpn_rt.errors import ConfigError
from dpn_rt.ray_cluster import check_room, check_share
from dpn_rt.schema.bounds import is_whole
from dpn_rt.schema.packages import load_ray
from dpn_rt.schema.text import shown

if TYPE_CHECKING:
    from ray.data import Dataset

PURPOSE = "a batch on Ray"


@dataclass(frozen=True)
class ActorPool:
    """How many actors there are, and what each takes.

    Raises:
        ConfigError: a value is of the wrong type or out of range.
    """

    actors: int | tuple[int, int]
    """Or the fewest and the most, by how many rows wait."""
    batch_size: int
    """Rows that an actor gets at a time."""
    cpus_per_actor: float = 1.0
    gpus_per_actor: float = 0.0

    def __post_init__(self) -> None:
        numbers = self.actors if isinstance(self.actors, tuple) and len(self.actors) == 2 else (self.actors,)
        if not all(map(is_whole, numbers)) or list(numbers) != sorted(numbers):
            raise ConfigError(f"actors={shown(self.actors)}: expected at least 1, or the fewest and the most")
        if not is_whole(self.batch_size):
            raise ConfigError(f"batch_size={shown(self.batch_size)}: expected a whole number of at least 1")
        for name in ("cpus_per_actor", "gpus_per_actor"):
            value = getattr(self, name)
            check_share(f"{name}={shown(value)}", value)

    @property
    def most(self) -> int:
        """Actors at one time."""
        return self._bounds[1]

    def map(self, dataset: Dataset, step: Callable[..., Any], *arguments: Any) -> Dataset:
        """A dataset whose tables have gone through the actors.

        An actor that dies is started again, with the rows that it had.

        Args:
            dataset: of rows.
            step: class whose objects are called with a `pyarrow.Table` and return one. Each actor has one object.
            arguments: of the class.
        """
        data = load_ray("ray.data", PURPOSE)
        fewest, most = self._bounds
        size = {"size": fewest} if fewest == most else {"min_size": fewest, "max_size": most}
        return dataset.map_batches(
            step,
            fn_constructor_args=arguments,
            batch_size=self.batch_size,
            batch_format="pyarrow",
            zero_copy_batch=True,
            compute=data.ActorPoolStrategy(**size),
            num_cpus=self.cpus_per_actor,
            num_gpus=self.gpus_per_actor or None,
        )

    def check_room(self) -> None:
        """Refuses actors for which the cluster has no room: Ray would wait for it without an end.

        Raises:
            ConfigError: the fewest need more than there is.
        """
        fewest, _ = self._bounds
        cpus, gpus = (
            (f"{name}={getattr(self, name):g}", getattr(self, name)) for name in ("cpus_per_actor", "gpus_per_actor")
        )
        check_room(load_ray("ray", PURPOSE), f"actors={shown(self.actors)}", fewest, cpus, gpus)

    def takes_all_cores(self) -> str | None:
        """Why Ray would wait without an end for a core to read with, where the fewest actors have them all."""
        fewest, _ = self._bounds
        taken, there = fewest * self.cpus_per_actor, load_ray("ray", PURPOSE).cluster_resources().get("CPU", 0.0)
        if taken < there:
            return None
        return (
            f"{fewest} engines with {self.cpus_per_actor:g} cores each take all {there:g} cores of the cluster: "
            "expected one more, to read and write with"
        )

    @property
    def _bounds(self) -> tuple[int, int]:
        return (self.actors, self.actors) if isinstance(self.actors, int) else self.actors
