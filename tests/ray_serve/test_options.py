"""What a service is asked for: arguments of a config file, and what follows from them."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from dpn_rt import DpnError, serve_ray
from dpn_rt.ray_serve import ingress
from dpn_rt.ray_serve.app import build
from dpn_rt.ray_serve.options import ServiceOptions


@pytest.fixture
def arguments(tmp_path: Path) -> dict[str, Any]:
    return {"engine": str(tmp_path / "engine")}


def test_arguments_of_a_config_file_become_deployments(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DPN_RT_API_KEY", "secret")
    scaling = {"max_replicas": 3, "upscale_delay_s": 1.0}
    options = {"engine_options": {"max_num_seqs": 6}, "server": {"shutdown_timeout": 5}, "autoscaling": scaling}
    application = build({**arguments, **options})
    replica = application._bound_deployment.init_args[0]._bound_deployment
    config = replica._deployment_config
    assert config.autoscaling_config.target_ongoing_requests == 3 and config.autoscaling_config.max_replicas == 3
    assert config.max_ongoing_requests == 6 + 8 and config.graceful_shutdown_timeout_s == 15
    bound = replica.init_args[0]
    assert bound.server.model_name == "engine" and bound.server.api_key == "secret"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"replicas": 0}, "replicas=0: expected at least 1"),
        ({"replica": 2}, "replica: unknown, expected one of engine, .*"),
        (
            {"autoscaling": {"min_replicas": 3, "max_replicas": 2}},
            "autoscaling: max_replicas=2: expected at least min_replicas=3",
        ),
        ({"autoscaling": {}}, r"autoscaling\.max_replicas: missing, expected it"),
        ({"engine_options": {"max_num_seqs": 0}}, "engine_options: max_num_seqs=0: expected .*"),
        ({"engine_options": {"max_seqs": 1}}, r"engine_options\.max_seqs: unknown, expected one of max_num_seqs, .*"),
        ({"server": {"workers": 0}}, "server: workers=0: expected at least 1"),
        ({"server": {"workers": "x"}}, r"server\.workers='x': expected a valid integer.*"),
        ({"server": {"api_key": 12345}}, r"server\.api_key=\.\.\.: expected a valid string"),
        ({"server": 1}, "server=1: expected a dictionary.*"),
        ({"cpus_per_replica": float("inf")}, "cpus_per_replica=inf: expected a finite number"),
        ({"capacity": "many"}, "capacity='many': expected a valid integer.*"),
    ],
)
def test_wrong_arguments_are_told(arguments: dict[str, Any], change: dict[str, Any], words: str) -> None:
    with pytest.raises(DpnError, match=f"^{words}$"):
        build({**arguments, **change})


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, None),
        ({"replicas": 2}, False),
        ({"replicas": 2, "engine_options": {"copy_weights": True}}, True),
        ({"autoscaling": {"min_replicas": 1, "max_replicas": 1}}, None),
        ({"autoscaling": {"min_replicas": 1, "max_replicas": 3}}, False),
    ],
)
def test_several_replicas_share_the_file_of_weights(
    arguments: dict[str, Any], change: dict[str, Any], expected: bool | None
) -> None:
    options = ServiceOptions.model_validate({**arguments, "engine_options": {}, **change})
    assert options.options_of_one.copy_weights is expected


def test_the_example_of_a_config_file_is_taken() -> None:
    values = yaml.safe_load((Path(__file__).parents[2] / "examples" / "deploy" / "ray_serve.yaml").read_text())
    (application,) = ServeDeploySchema(**values).applications
    module, _, name = application.import_path.partition(":")
    assert getattr(importlib.import_module(module), name) is build
    options = ServiceOptions.model_validate(application.args)
    assert options.autoscaling is not None and options.server.shutdown_timeout == 40
    assert build(application.args)._bound_deployment.name == "Ingress"


def test_what_a_config_file_leaves_out_is_as_the_command_has_it(arguments: dict[str, Any]) -> None:
    """Also the rest of `engine_options` and `server`, where some of their fields are given."""

    def command(*options: str) -> ServiceOptions:
        return serve_ray.service_options(serve_ray.parser().parse_args(["--engine", arguments["engine"], *options]))

    assert ServiceOptions.model_validate(arguments) == command()
    some = {"engine_options": {"max_num_seqs": 8}, "server": {"workers": 3}}
    assert ServiceOptions.model_validate({**arguments, **some}) == command("--max-num-seqs", "8", "--workers", "3")
    none = {"engine_options": {"reuse_bytes": 0, "max_chunk_tokens": None}}
    assert ServiceOptions.model_validate({**arguments, **none}) == command(
        "--reuse-bytes", "0", "--max-chunk-tokens", "0"
    )


def test_options_are_given_or_built(arguments: dict[str, Any]) -> None:
    options = ServiceOptions.model_validate(arguments)
    assert options.places == 64 and options.engine_options.reuse_bytes == 2**28
    assert build(options)._bound_deployment.name == "Ingress"
    assert ingress.RETRIES == 2
