"""Replicas on Ray: right answers, the share of requests whose replica knew the image, a killed replica, fewer replicas.

python -m benchmarks.ray_serve --engine DIR --requests 1000 --json FILE
python -m benchmarks.ray_serve --engine DIR --part scaling --json FILE
python -m benchmarks.ray_serve --engine DENSE --reduce none fastv:k=2,ratio=0.5 --requests 500

Starts a Ray cluster on this machine with two replicas of one thread each, and sends requests of `clients` clients:
routes or reductions are forced or not, every second reply is streamed. Each answer must be the one that `LLM` gives
alone, in text, route and probabilities (see `benchmarks.identity`), or, after a replica was killed, say that it was.
Then a replica is killed under load (kill -9). With `--part scaling` the service is made one replica smaller under load,
and then load makes it larger again by itself. The engine should be in float32. Fails (exit status 1) if an answer is
wrong, or a request has none.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import secrets
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

# Before Ray is loaded: it tells its makers nothing, and keeps no token in the user's home.
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))

import httpx
import numpy as np
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from benchmarks.identity import Answer, Case, answer_alone, cases, fault_of
from benchmarks.load.server_process import serving
from benchmarks.measuring.result_file import write_json
from dpn_rt import LLM
from dpn_rt.ray_serve.app import build
from dpn_rt.ray_serve.messages import REPLICA_HEADER
from dpn_rt.terminal import escape_output

APPLICATION, MODEL = "benchmark", "model"
PATH = "/v1/chat/completions"
REPLICA = REPLICA_HEADER.decode()


@dataclass
class Phase:
    """What came of the requests of one phase."""

    right: int = 0
    told: int = 0
    """Of a killed replica, with an error that says so."""
    wrong: list[str] = field(default_factory=list)
    seconds: float = 0.0
    replicas: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    """Image -> requests by replica."""

    @property
    def affinity(self) -> float:
        """Share of the requests about an image after its first that went to the replica which has most of them."""
        again = sum(counts.total() - 1 for counts in self.replicas.values())
        return sum(max(counts.values()) - 1 for counts in self.replicas.values()) / max(again, 1)

    def add(self, other: Phase) -> None:
        """Takes the requests of another phase; not by image."""
        self.right, self.told, self.wrong = self.right + other.right, self.told + other.told, self.wrong + other.wrong
        self.seconds += other.seconds

    def summary(self) -> dict[str, Any]:
        rate = (self.right + self.told) / self.seconds
        return {"right": self.right, "told": self.told, "wrong": self.wrong[:5], "requests_per_s": round(rate, 2)}


def ask(
    client: httpx.Client, given: Mapping[Case, Answer], clients: int, requests: int, during: Callable[[], None]
) -> Phase:
    """Sends requests, drawn at random; calls `during` when a fifth of them has been answered."""
    phase, started = Phase(), time.perf_counter()

    def work(job: tuple[Case, bool]) -> None:
        case, stream = job
        try:
            reply = client.post(PATH, json={**case.body, "stream": stream})
        except httpx.HTTPError as error:
            phase.wrong.append(f"{case.name}: {type(error).__name__}")
            return
        if "replica_died" in reply.text:
            phase.told += 1
        elif (fault := fault_of(reply, case, given[case], stream)) is not None:
            phase.wrong.append(f"{case.name}: {fault}")
        else:
            phase.right += 1
            phase.replicas[_first_image(case)][reply.headers.get(REPLICA, "")] += 1

    drawn = random.choices(list(given), k=requests)
    with ThreadPoolExecutor(clients) as threads:
        answers = [threads.submit(work, (case, number % 2 == 0)) for number, case in enumerate(drawn)]
        while sum(answer.done() for answer in answers) < requests // 5:
            time.sleep(0.01)
        during()
        for answer in answers:
            answer.result()
    phase.seconds = time.perf_counter() - started
    print(json.dumps(phase.summary()), file=sys.stderr, flush=True)
    return phase


def latency_ms(client: httpx.Client, given: Mapping[Case, Answer], requests: int) -> float:
    """Median of a request alone, in milliseconds."""
    found = []
    for case in islice(cycle(given), requests):
        started = time.perf_counter()
        client.post(PATH, json=case.body)
        found.append(1000 * (time.perf_counter() - started))
    return round(float(np.median(found)), 1)


@contextmanager
def service(arguments: dict[str, Any]) -> Iterator[httpx.Client]:
    """A cluster with the service; its folder is removed at the end."""
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    try:
        ray.init(
            "local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=2**27,
            _temp_dir=folder,
            log_to_driver=False,
        )
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(build(arguments), name=APPLICATION)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            yield client
        serve.shutdown()
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def process_ids() -> dict[str, int]:
    """Of the replicas, by their names."""
    handle: Any = serve.get_deployment_handle("Replica", APPLICATION)
    return dict(handle.broadcast("process_ids").results(timeout_s=30))


def image_cache(client: httpx.Client) -> float:
    """Share of all images that a replica had in its cache."""
    sums: Counter[str] = Counter()
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            sums[sample.name] += sample.value
    return sums["dpn_rt:image_cache_hits_total"] / sums["dpn_rt:image_cache_queries_total"]


def kill_one() -> tuple[str, float]:
    """Kills a replica; gives its name, and when."""
    name, process_id = random.choice(sorted(process_ids().items()))
    os.kill(process_id, signal.SIGKILL)
    return name, time.perf_counter()


def seconds_until_two(victim: str, since: float) -> float:
    """How long it took until there were two replicas again."""
    while len(names := process_ids()) < 2 or victim in names:
        assert time.perf_counter() < since + 100, "the replica does not come back"
        time.sleep(0.1)
    return round(time.perf_counter() - since, 1)


def run(options: argparse.Namespace, given: Mapping[Case, Answer]) -> dict[str, Any]:
    arguments = {
        "engine": str(options.engine.resolve()),
        "replicas": 2,
        "capacity": options.capacity,
        "engine_options": {"max_num_seqs": 16, "max_chunk_tokens": 64, "reuse_bytes": 2**26},
        "server": {"model_name": MODEL},
        "health_check_period": 1.0,
        "log_level": "warning",
    }
    if options.reduce:
        arguments["engine_options"]["reduce"] = arguments["server"]["reduce"] = options.reduce
    found: dict[str, Any] = {"engine": options.engine.name, "clients": options.clients, "capacity": options.capacity}
    phases: dict[str, Phase] = {}
    few = options.requests // 5
    with service(arguments) as client:
        if options.part == "load":
            found["latency_ms"] = latency_ms(client, given, 40)
            phases["load"] = ask(client, given, options.clients, options.requests, lambda: None)
            found["affinity"] = round(phases["load"].affinity, 4)
            found["image_cache_hits"] = round(image_cache(client), 4)
            killed: list[tuple[str, float]] = []
            phases["killed"] = ask(client, given, options.clients, few, lambda: killed.append(kill_one()))
            found["s_until_two_replicas"] = seconds_until_two(*killed[0])
        else:
            fewer = build({**arguments, "replicas": 1})
            phases["scaled_down"] = ask(client, given, options.clients, few, lambda: deploy(fewer))
            found["replicas_after_scaling_down"] = len(process_ids())
            scaling = {"max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay_s": 2}
            deploy(build({**arguments, "autoscaling": scaling}))
            since, phases["scaled_up"] = time.perf_counter(), Phase()
            while len(process_ids()) < 2:
                assert time.perf_counter() < since + 100, "no replica was added"
                phases["scaled_up"].add(ask(client, given, options.clients, few, lambda: None))
            found["s_until_scaled_up"] = round(time.perf_counter() - since, 1)
    return found | {name: phase.summary() for name, phase in phases.items()}


def deploy(application: Any) -> None:
    """Makes the running service another one, and waits until it is."""
    serve.run(application, name=APPLICATION)


def alone(options: argparse.Namespace, given: Mapping[Case, Answer]) -> dict[str, Any]:
    """The same load on one server without Ray, for comparison: all cores are its engine's."""
    limits = ("--max-num-seqs", "16", "--max-chunk-tokens", "64", "--served-model-name", MODEL)
    reduce = ["--reduce", *options.reduce] if options.reduce else []
    with serving(options.engine, *limits, *reduce) as (url, _), httpx.Client(base_url=url, timeout=300) as client:
        latency = latency_ms(client, given, 40)
        phase = ask(client, given, options.clients, options.requests // 5, lambda: None)
        return {"latency_ms": latency, **phase.summary()}


def _first_image(case: Case) -> str:
    parts = case.body["messages"][0]["content"]
    return str(next(part["image_url"]["url"] for part in parts if part["type"] == "image_url"))


def main() -> int:
    escape_output()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True)
    parser.add_argument("--reduce", nargs="+", default=[], metavar="SPEC", help="of a dense model")
    parser.add_argument("--part", choices=("load", "scaling"), default="load")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--capacity", type=int, default=16, help="requests of a replica at a time")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    llm = LLM(options.engine, reduce=options.reduce or None)
    variants: list[dict[str, Any]] = [{"reduce": spec} for spec in options.reduce]
    if not variants:
        boundaries = len(llm.model.reduction.layers)
        variants = [{}, {"route": [0] * boundaries}, {"route": [1] * boundaries}, {"router_bias": 4.0}]
    asked = cases(llm, MODEL, variants, per_image=2, max_tokens=16)
    given = {case: answer_alone(llm, case) for case in asked}
    del llm
    result: dict[str, Any] = {} if options.part == "scaling" else {"one_server": alone(options, given)}
    result["ray"] = run(options, given)
    print(json.dumps(result, indent=1))
    if options.json is not None:
        write_json(options.json, result)
    return 1 if any(part["wrong"] for part in result["ray"].values() if isinstance(part, dict)) else 0


if __name__ == "__main__":
    sys.exit(main())
