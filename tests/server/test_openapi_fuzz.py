"""Requests generated from the server's own description: each is answered, and never with a 5xx status."""

from __future__ import annotations

from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings

from tests.server.conftest import Ask, RunningServer

EXPECTED = {
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/models",
    "/tokenize",
    "/detokenize",
    "/health",
    "/metrics",
    "/version",
}


def test_no_request_is_a_server_error(server: RunningServer) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    operations = [result.ok() for result in schema.get_all_operations()]
    assert {operation.path for operation in operations} >= EXPECTED
    statuses = {operation.label: fuzz(operation) for operation in operations}
    assert 200 in statuses["GET /health"]
    assert 400 in statuses["POST /v1/completions"]
    assert server.post(Ask().body()).status_code == 200
    server.wait_until_idle()


def fuzz(operation: Any) -> set[int]:
    """Statuses of the replies to an operation's requests."""
    statuses = set()

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy())
    def ask(case: schemathesis.Case) -> None:
        if isinstance(case.body, dict):
            case.body["max_tokens"] = 4  # only to be quick
        reply = case.call(timeout=30)
        assert reply.status_code < 500, reply.text
        statuses.add(reply.status_code)

    ask()
    return statuses
