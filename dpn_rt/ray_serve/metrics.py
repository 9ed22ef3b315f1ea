"""The metrics of all replicas as one text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

LABEL = "replica"


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def merged(texts: Mapping[str, str]) -> bytes:
    """Metrics of several servers, each sample with a label more.

    Args:
        texts: in Prometheus' text format, by the name of the server, which becomes the label `replica`.

    Returns:
        The same format; a family is named once, and has the samples of all servers.
    """
    families: dict[str, Metric] = {}
    for name, text in texts.items():
        for family in text_string_to_metric_families(text):
            together = families.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            for sample in family.samples:
                together.add_sample(sample.name, {**sample.labels, LABEL: name}, sample.value, sample.timestamp)
    return generate_latest(_Families(families.values()))
