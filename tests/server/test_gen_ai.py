"""Finished requests under the names of OpenTelemetry's conventions for generative models."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader

from dpn_rt.errors import ConfigError, StepError
from dpn_rt.outputs import RequestOutput
from dpn_rt.server.gen_ai import GenAiMetrics, otlp_metrics
from tests.server.conftest import MODEL, Ask, StartServer

SECONDS = {"gen_ai.server.request.duration", "gen_ai.server.time_to_first_token", "gen_ai.server.time_per_output_token"}
TOKENS = "gen_ai.client.token.usage"


def points_of(reader: InMemoryMetricReader) -> dict[str, list[Any]]:
    """Points of each metric."""
    data = reader.get_metrics_data()
    assert data is not None
    scopes = [scope for resource in data.resource_metrics for scope in resource.scope_metrics]
    return {metric.name: list(metric.data.data_points) for scope in scopes for metric in scope.metrics}


@pytest.mark.parametrize("stream", [False, True])
def test_requests_are_measured(start_server: StartServer, stream: bool) -> None:
    reader = InMemoryMetricReader()
    server = start_server(gen_ai_metrics=GenAiMetrics(MeterProvider([reader]), MODEL))
    usage = server.post(Ask().body(ignore_eos=True)).json()["usage"]
    body = Ask(1).body(stream=stream, n=2, temperature=1, ignore_eos=True)
    assert server.post(body).status_code == 200
    points = points_of(reader)
    assert points.keys() == {*SECONDS, TOKENS}
    common = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "dpn_rt"}
    common |= {"gen_ai.request.model": MODEL, "gen_ai.response.model": MODEL}
    for name in SECONDS:
        [point] = points[name]
        assert point.count == 2 and point.sum > 0 and point.min > 0
        assert dict(point.attributes) == common
    by_type = {point.attributes["gen_ai.token.type"]: point for point in points[TOKENS]}
    assert by_type["output"].count == 2 and by_type["output"].sum == 3 * 8
    assert by_type["input"].min <= usage["prompt_tokens"] <= by_type["input"].max
    [first], [whole] = points["gen_ai.server.time_to_first_token"], points["gen_ai.server.request.duration"]
    assert first.sum < whole.sum
    assert whole.explicit_bounds[:3] == pytest.approx((0.01, 0.02, 0.04)) and len(whole.explicit_bounds) == 14
    assert by_type["input"].explicit_bounds[-1] == 67108864


def test_completions_of_texts_and_of_one_token(start_server: StartServer) -> None:
    reader = InMemoryMetricReader()
    server = start_server(gen_ai_metrics=GenAiMetrics(MeterProvider([reader]), MODEL))
    body = {"model": MODEL, "prompt": ["a", "b"], "max_tokens": 1}
    assert server.post(body, "/v1/completions").status_code == 200
    points = points_of(reader)
    assert points.keys() == {*SECONDS, TOKENS} - {"gen_ai.server.time_per_output_token"}, "there are no later tokens"
    for name in points:
        assert {point.attributes["gen_ai.operation.name"] for point in points[name]} == {"text_completion"}
        assert all(point.count == 2 for point in points[name])


def test_a_failed_request_has_a_duration_and_the_errors_type(start_server: StartServer) -> None:
    reader = InMemoryMetricReader()
    server = start_server(gen_ai_metrics=GenAiMetrics(MeterProvider([reader]), MODEL))
    engine = server.service.engine
    whole = engine.stream

    async def failing(*args: Any, **kwargs: Any) -> Any:
        async for event in whole(*args, **kwargs):
            is_last = isinstance(event, RequestOutput)
            yield dataclasses.replace(event, error=StepError("a step failed")) if is_last else event

    object.__setattr__(engine, "stream", failing)
    assert server.post(Ask().body()).status_code == 500
    points = points_of(reader)
    assert points.keys() == {"gen_ai.server.request.duration"}
    assert points["gen_ai.server.request.duration"][0].attributes["error.type"] == "StepError"


def test_the_collector_gets_all_metrics_before_the_server_ends(
    start_server: StartServer, collector: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    url, bodies = collector
    server = start_server(gen_ai_metrics=otlp_metrics(f"{url}/v1/metrics", MODEL, "dpn_rt"))
    assert server.post(Ask().body()).status_code == 200
    server.stop()
    resources = [r for body in bodies for r in ExportMetricsServiceRequest.FromString(body).resource_metrics]
    names = {metric.name for resource in resources for scope in resource.scope_metrics for metric in scope.metrics}
    assert names == {*SECONDS, TOKENS}


def test_an_endpoint_that_is_no_url_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'localhost:4318': expected a URL such as http://localhost:4318/v1/metrics"):
        otlp_metrics("localhost:4318", MODEL, "dpn_rt")
