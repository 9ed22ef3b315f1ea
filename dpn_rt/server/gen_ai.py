"""OpenTelemetry's names for generative models: attributes of spans and metrics, and the metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from dpn_rt.outputs import RequestOutput
from dpn_rt.prompts.processor import ProcessedPrompt
from dpn_rt.server.otlp import named_resource

if TYPE_CHECKING:
    from opentelemetry.metrics import Histogram
    from opentelemetry.sdk.metrics import MeterProvider

Operation = Literal["chat", "text_completion"]
PROVIDER = "dpn_rt"
# The conventions' bounds of buckets.
_DURATION = tuple(0.01 * 2**power for power in range(14))
_FIRST_TOKEN = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0)
_OUTPUT_TOKEN = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5)
_TOKENS = tuple(4.0**power for power in range(14))


def common_attributes(model_name: str, operation: Operation, output: RequestOutput) -> dict[str, str]:
    """Attributes of all spans and metrics of a request; `error.type` only where it failed."""
    attributes: dict[str, str] = {
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": model_name,
        "gen_ai.response.model": model_name,
    }
    return attributes if output.error is None else attributes | {"error.type": type(output.error).__name__}


def num_output_tokens(output: RequestOutput) -> int:
    """Tokens of all completions of a prompt."""
    return sum(len(completion.token_ids) for completion in output.outputs)


class GenAiMetrics:
    """Measures finished requests. The same numbers as in `metrics.py`, pushed under the conventions' names."""

    def __init__(self, provider: MeterProvider, model_name: str) -> None:
        self._provider, self._model_name = provider, model_name
        self._duration = self._histogram("server.request.duration", "s", "From arrival to the last token.", _DURATION)
        self._first_token = self._histogram(
            "server.time_to_first_token", "s", "From arrival to the first token.", _FIRST_TOKEN
        )
        self._output_token = self._histogram(
            "server.time_per_output_token", "s", "Mean time of the tokens after the first.", _OUTPUT_TOKEN
        )
        self._tokens = self._histogram("client.token.usage", "{token}", "Tokens of prompts and answers.", _TOKENS)

    def record_finished(self, prompt: ProcessedPrompt, output: RequestOutput, operation: Operation) -> None:
        """Measures a request that has ended in the engine."""
        attributes = common_attributes(self._model_name, operation, output)
        metrics = output.metrics
        if metrics.latency is not None:
            self._duration.record(metrics.latency, attributes)
        if output.error is None:
            self._record_success(prompt, output, attributes)

    def _record_success(self, prompt: ProcessedPrompt, output: RequestOutput, attributes: Mapping[str, str]) -> None:
        self._tokens.record(prompt.num_rows, {**attributes, "gen_ai.token.type": "input"})
        self._tokens.record(num_output_tokens(output), {**attributes, "gen_ai.token.type": "output"})
        metrics = output.metrics
        if metrics.first_token is None or metrics.finish is None:
            return
        self._first_token.record(metrics.first_token - metrics.arrival, attributes)
        later = max(len(completion.token_ids) for completion in output.outputs) - 1
        if later > 0:
            self._output_token.record((metrics.finish - metrics.first_token) / later, attributes)

    def close(self) -> None:
        """Sends what has not been sent yet."""
        self._provider.shutdown()

    def _histogram(self, name: str, unit: str, text: str, bounds: tuple[float, ...]) -> Histogram:
        meter = self._provider.get_meter("dpn_rt")
        return meter.create_histogram(
            f"gen_ai.{name}", unit=unit, description=text, explicit_bucket_boundaries_advisory=bounds
        )


def otlp_metrics(endpoint: str, model_name: str, service_name: str) -> GenAiMetrics:
    """Metrics that are sent to a collector every minute, or as OTEL_METRIC_EXPORT_INTERVAL says.

    Args:
        endpoint: URL of the collector, OTLP over HTTP, for instance http://localhost:4318/v1/metrics.
        model_name: an attribute of the metrics.
        service_name: of this server; the variable OTEL_SERVICE_NAME overrides it.

    Raises:
        ConfigError: the packages are missing, or the endpoint is no URL.
    """
    resource = named_resource(endpoint, "metrics", service_name)
    from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader

    reader = PeriodicExportingMetricReader(OTLPMetricExporter(endpoint=endpoint))
    return GenAiMetrics(MeterProvider(metric_readers=[reader], resource=resource), model_name)
