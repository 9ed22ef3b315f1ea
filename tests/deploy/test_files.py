"""Container, manifests and dashboard: valid by their own tools, and about what the server really has."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from dpn_rt.serve import parser
from tests.server.conftest import Ask, StartServer, engine_dir, start_server

_ = (engine_dir, start_server)
ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "examples" / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboard.json").read_text())
QUERIES = [(panel["title"], target["expr"]) for panel in DASHBOARD["panels"] for target in panel["targets"]]
MANIFESTS = {each["kind"]: each for each in yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text())}
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())


def run_tool(*command: str) -> None:
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def tool(name: str) -> str:
    return str(Path(sys.executable).parent / name)


def test_the_dockerfile_has_no_lint() -> None:
    run_tool(tool("hadolint"), "--failure-threshold", "style", str(DEPLOY / "Dockerfile"))


def test_kubernetes_takes_the_manifests() -> None:
    run_tool(tool("kubernetes-validate"), "--strict", str(DEPLOY / "kubernetes.yaml"))


def container() -> dict[str, Any]:
    pod = MANIFESTS["Deployment"]["spec"]["template"]["spec"]
    return dict(pod["containers"][0])


def test_a_pod_that_ends_has_the_time_to_drain() -> None:
    arguments = parser().parse_args(["--engine", "/engine", *container()["args"]])
    waiting = container()["lifecycle"]["preStop"]["sleep"]["seconds"]
    grace = MANIFESTS["Deployment"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert waiting + arguments.shutdown_timeout < grace
    server = COMPOSE["services"]["dpn_rt"]
    arguments = parser().parse_args(["--engine", "/engine", *server["command"]])
    assert arguments.shutdown_timeout < float(server["stop_grace_period"].removesuffix("s"))


def test_probes_ask_for_what_needs_no_key(start_server: StartServer) -> None:
    server = start_server(api_key="secret")
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        path = container()[probe]["httpGet"]["path"]
        assert server.client.get(path, headers={"Host": "10.1.2.3:8000"}).status_code == 200
    assert server.client.get("/metrics").status_code == 401
    assert server.client.get("/metrics", headers={"Authorization": "Bearer secret"}).status_code == 200


def instructions(name: str) -> Iterator[str]:
    text = re.sub(r"\\\n", " ", (DEPLOY / "Dockerfile").read_text())
    return (line.removeprefix(name).strip() for line in text.splitlines() if line.startswith(f"{name} "))


def test_the_container_starts_the_server_with_options_that_it_has() -> None:
    entry, command = json.loads(next(instructions("ENTRYPOINT"))), json.loads(next(instructions("CMD")))
    assert entry[:3] == ["python", "-m", "dpn_rt.serve"]
    arguments = parser().parse_args([*entry[3:], *command])
    assert str(arguments.port) == next(instructions("EXPOSE")) == str(container()["ports"][0]["containerPort"])
    assert int(next(instructions("USER")).split(":")[0]) == 10001


def test_the_container_has_all_that_a_build_needs() -> None:
    taken = [
        line.removeprefix("!")
        for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines()
        if line.startswith("!")
    ]
    assert all((ROOT / name).exists() for name in taken)
    listed = set(re.findall(r"(?:add_subdirectory|include)\((\w+)", (ROOT / "CMakeLists.txt").read_text()))
    assert {name for name in listed if (ROOT / name).is_dir()} <= set(taken)


@pytest.mark.parametrize("expression", [expression for _, expression in QUERIES])
def test_queries_are_promql(expression: str) -> None:
    promql_parser.parse(plain(expression))


def plain(expression: str) -> str:
    """Without Grafana's variables."""
    return expression.replace("$__rate_interval", "1m").replace("$model", ".*")


def selectors(node: Any, labels: tuple[str, ...] = ()) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names of metrics, each with the labels that it is grouped by."""
    if isinstance(node, promql_parser.AggregateExpr):
        labels = tuple(node.modifier.labels) if node.modifier else ()
    if isinstance(node, promql_parser.VectorSelector):
        yield node.name, labels
    for name in ("expr", "lhs", "rhs", "vector_selector"):
        if (inner := getattr(node, name, None)) is not None:
            yield from selectors(inner, labels)
    yield from itertools.chain.from_iterable(selectors(each, labels) for each in getattr(node, "args", None) or ())


def test_the_dashboard_asks_for_what_servers_have(start_server: StartServer) -> None:
    server = start_server()
    assert server.post(Ask().body(max_tokens=4, ignore_eos=True)).status_code == 200
    assert server.post(Ask().body(temperature=-1)).status_code == 400
    text = server.client.get("/metrics").text
    samples = {
        (sample.name, label)
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        for label in (*sample.labels, "")
    }
    # A model with a trained reduction counts no training-free ones.
    declared = set(re.findall(r"^# TYPE (\S+)", text, re.MULTILINE))
    for title, expression in QUERIES:
        found = list(selectors(promql_parser.parse(plain(expression))))
        assert found, title
        for name, labels in found:
            if name.startswith("dpn_rt:reduction_"):
                assert name in declared, title
                continue
            for label in ("model_name", *labels):
                assert (name, label) in samples, f"{title}: {name} has no label {label}"


def test_every_metric_is_somewhere_on_the_dashboard(start_server: StartServer) -> None:
    left_out = {"dpn_rt:e2e_request_latency_seconds", "dpn_rt:reduction_flops_saved"}
    text = start_server().client.get("/metrics").text
    names = {family.name for family in text_string_to_metric_families(text) if family.name.startswith("dpn_rt:")}
    shown = json.dumps(QUERIES)
    missing = {name for name in names if name not in shown and not name.endswith("_created")}
    assert missing == left_out


def test_prometheus_asks_with_the_key() -> None:
    config = yaml.safe_load((DEPLOY / "prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    secret = Path(job["authorization"]["credentials_file"]).name
    assert COMPOSE["secrets"][secret] == {"environment": "DPN_RT_API_KEY"}
    assert COMPOSE["services"]["prometheus"]["secrets"] == [secret]
    host, port = job["static_configs"][0]["targets"][0].split(":")
    assert host in COMPOSE["services"] and port == "8000"


def test_every_mounted_file_is_there() -> None:
    for service in COMPOSE["services"].values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            assert not source.startswith(".") or (DEPLOY / source).is_file(), source
