from __future__ import annotations

import threading
import time

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from dpn_rt.errors import ConfigError
from dpn_rt.server.otlp import close_in_time
from dpn_rt.server.tracing import Tracing, otlp_tracing
from tests.server.conftest import MODEL, Ask, StartServer

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


def spans_of(exporter: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    deadline = time.monotonic() + 10
    while not (found := [span for span in exporter.get_finished_spans() if name in span.name]):
        assert time.monotonic() < deadline, f"no span {name}"
        time.sleep(0.01)
    return found


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_is_a_span_below_its_clients(start_server: StartServer, stream: bool) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    server = start_server(tracing=Tracing(provider, MODEL))
    before = time.time_ns()
    reply = server.post(Ask().body(stream=stream), headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    assert reply.status_code == 200
    [request] = spans_of(exporter, "/v1/chat/completions")
    [generate] = spans_of(exporter, "generate")
    assert request.parent is not None and f"{request.parent.span_id:016x}" == PARENT
    assert generate.parent is not None and generate.parent.span_id == request.context.span_id
    assert f"{generate.context.trace_id:032x}" == TRACE
    attributes = dict(generate.attributes or {})
    assert attributes["gen_ai.usage.output_tokens"] == 8 and attributes["gen_ai.response.finish_reasons"] == ("length",)
    assert attributes["gen_ai.operation.name"] == "chat" and attributes["gen_ai.provider.name"] == "dpn_rt"
    assert attributes["gen_ai.request.model"] == attributes["gen_ai.response.model"] == MODEL
    assert attributes["gen_ai.usage.cache_read.input_tokens"] == 0 and "error.type" not in attributes
    visual_tokens = attributes["dpn_rt.visual_tokens"]
    assert isinstance(visual_tokens, tuple) and len(visual_tokens) == 4 and visual_tokens[0] == 256
    assert [event.name for event in generate.events] == ["first step", "first token"]
    times = [before, generate.start_time, *(event.timestamp for event in generate.events), generate.end_time]
    assert all(
        a is not None and b is not None and a <= b for a, b in zip(times, [*times[1:], time.time_ns()], strict=True)
    )
    assert not any(
        "background" in str(value)
        for span in exporter.get_finished_spans()
        for value in (span.attributes or {}).values()
    )


def test_health_is_not_traced(start_server: StartServer) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    server = start_server(tracing=Tracing(provider, MODEL))
    assert server.client.get("/health").status_code == 200
    assert server.client.get("/version").status_code == 200
    assert {span.name for span in spans_of(exporter, "/")} == {"GET /version"}


def test_a_collector_that_takes_nothing_holds_up_no_end(caplog: pytest.LogCaptureFixture) -> None:
    """Others still get what is left."""
    is_over, sent = threading.Event(), []
    close_in_time([lambda: is_over.wait(), lambda: sent.append("metrics")], seconds=0.1)
    assert sent == ["metrics"] and "lost" in caplog.text
    is_over.set()


def test_the_collector_gets_all_spans_before_the_server_ends(
    start_server: StartServer, collector: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    url, bodies = collector
    server = start_server(tracing=otlp_tracing(f"{url}/v1/traces", MODEL, "dpn_rt"))
    assert server.post(Ask().body()).status_code == 200
    server.stop()
    requests = [ExportTraceServiceRequest.FromString(body) for body in bodies]
    resources = [spans for request in requests for spans in request.resource_spans]
    names = [span.name for spans in resources for scope in spans.scope_spans for span in scope.spans]
    assert sorted(names) == ["POST /v1/chat/completions", "generate"]
    services = {
        a.value.string_value for spans in resources for a in spans.resource.attributes if a.key == "service.name"
    }
    assert services == {"dpn_rt"}


def test_an_endpoint_that_is_no_url_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"'localhost:4318': expected a URL"):
        otlp_tracing("localhost:4318", MODEL, "dpn_rt")
