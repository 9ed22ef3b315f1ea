"""Prometheus metrics, under vLLM's names with the prefix `dpn_rt:`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from dpn_rt.engine.engine import Progress
from dpn_rt.outputs import Pyramid, RequestOutput
from dpn_rt.prompts.processor import ProcessedPrompt
from dpn_rt.server.engine_client.messages import Load
from dpn_rt.server.reductions import Reductions

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self, model_name: str, load: Callable[[], Load], reductions: Reductions) -> None:
        """
        Args:
            load: gives the engine's load; called whenever metrics are read.
            reductions: name the training-free reductions that are counted apart.
        """
        self._name = model_name
        self._reductions = reductions
        self._registry = CollectorRegistry()
        self._registry.register(_LoadCollector(load, model_name))
        self._successes = self._counter("request_success", "Requests that ended, by reason.", "finished_reason")
        self._refusals = self._counter("request_refused", "Requests refused before the engine, by status.", "status")
        self._visual_tokens = self._counter("visual_tokens", "Visual tokens of prompts, per stage.", "stage")
        self._routes = self._counter("route", "Prompts with images, by the experts that they took.", "route")
        self._flops = self._counter("prefill_flops", "Decoder FLOPs of prefills.")
        self._saved_flops = self._counter("prefill_flops_saved", "Decoder FLOPs that reduction saved.")
        self._reduced = self._counter("reduction_requests", "Prompts with images, by reduction.", "reduction")
        self._before = self._counter("reduction_visual_tokens_before", "Visual tokens of images as given.", "reduction")
        self._after = self._counter("reduction_visual_tokens_after", "Visual tokens of the last stage.", "reduction")
        self._saved_by = self._counter("reduction_flops_saved", "Decoder FLOPs of prefills that it saved.", "reduction")
        self._first_token = self._histogram("time_to_first_token_seconds", "From arrival to the first token.")
        self._between = self._histogram("inter_token_latency_seconds", "Between two tokens of a request.")
        self._total = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.")
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to the first step.")
        self._prefill = self._histogram("request_prefill_time_seconds", "From the first step to the first token.")
        self._decode = self._histogram("request_decode_time_seconds", "From the first token to the last.")
        self._prepare = self._histogram("request_preparation_time_seconds", "Fetching, decoding, tokenising.")

    def text(self) -> bytes:
        """All metrics in the exposition format."""
        return generate_latest(self._registry)

    def count_refusal(self, status: int) -> None:
        self._refusals.labels(self._name, str(status)).inc()

    def observe_preparation(self, seconds: float) -> None:
        self._prepare.labels(self._name).observe(seconds)

    def count_finished(self, prompt: ProcessedPrompt, output: RequestOutput) -> None:
        """Counts a request that the engine has ended."""
        name, metrics = self._name, output.metrics
        for completion in output.outputs:
            self._successes.labels(name, completion.finish_reason or "error").inc()
        self._count_pyramid(prompt, output)
        if metrics.finish is None:
            return
        self._total.labels(name).observe(metrics.finish - metrics.arrival)
        if metrics.queue is None or metrics.first_token is None:
            return
        self._queue.labels(name).observe(metrics.queue)
        self._first_token.labels(name).observe(metrics.first_token - metrics.arrival)
        self._prefill.labels(name).observe(metrics.first_token - metrics.arrival - metrics.queue)
        self._decode.labels(name).observe(metrics.finish - metrics.first_token)

    def count_client_left(self, completions: int) -> None:
        """Counts a prompt whose client left before its end, or whose request failed because of another prompt."""
        self._successes.labels(self._name, "abort").inc(completions)

    def observe_mean_gap(self, output: RequestOutput) -> None:
        """Records the times between the tokens of a request that was not streamed: their mean, once per gap."""
        metrics = output.metrics
        if metrics.finish is None or metrics.first_token is None:
            return
        gaps = [len(completion.token_ids) - 1 for completion in output.outputs]
        for _ in range(sum(count for count in gaps if count > 0)):  # completions come side by side
            self._between.labels(self._name).observe((metrics.finish - metrics.first_token) / max(gaps))

    def gap_timer(self) -> Callable[[Sequence[Progress]], None]:
        """A function that records the times between the tokens of each completion of a prompt.

        It is called with what has come, whenever something has.
        """
        last: dict[int, float] = {}
        observe = self._between.labels(self._name).observe

        def tick(progress: Sequence[Progress]) -> None:
            now = time.monotonic()
            counts: dict[int, int] = {}
            for item in progress:
                counts[item.index] = counts.get(item.index, 0) + len(item.token_ids)
            for index, num_tokens in counts.items():
                if index in last:
                    for _ in range(num_tokens):
                        observe((now - last[index]) / num_tokens)
                if num_tokens:
                    last[index] = now

        return tick

    def _count_pyramid(self, prompt: ProcessedPrompt, output: RequestOutput) -> None:
        pyramid = output.pyramid
        if not prompt.images or not pyramid.kv_lengths:
            return
        for stage, count in enumerate(pyramid.visual_tokens):
            self._visual_tokens.labels(self._name, str(stage)).inc(count)
        route = ",".join("-" if expert is None else str(expert) for expert in pyramid.experts)
        self._routes.labels(self._name, route).inc()
        if pyramid.flops is not None:
            self._flops.labels(self._name).inc(pyramid.flops.prefill)
            self._saved_flops.labels(self._name).inc(pyramid.flops.dense_prefill - pyramid.flops.prefill)
        self._count_reduction(prompt, pyramid)

    def _count_reduction(self, prompt: ProcessedPrompt, pyramid: Pyramid) -> None:
        label = self._reductions.label(prompt.reduction)
        if label is None:
            return
        self._reduced.labels(self._name, label).inc()
        self._before.labels(self._name, label).inc(prompt.num_dense_rows - prompt.num_text_rows)
        self._after.labels(self._name, label).inc(pyramid.visual_tokens[-1])
        if pyramid.flops is not None:
            self._saved_by.labels(self._name, label).inc(pyramid.flops.dense_prefill - pyramid.flops.prefill)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"dpn_rt:{name}", text, ("model_name", *labels), registry=self._registry)

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"dpn_rt:{name}", text, ("model_name",), buckets=SECONDS, registry=self._registry)


class _LoadCollector(Collector):
    def __init__(self, load: Callable[[], Load], model_name: str) -> None:
        self._load, self._name = load, model_name

    def collect(self) -> Iterable[Metric]:
        load = self._load()
        used = load.kv_blocks_used / load.kv_blocks if load.kv_blocks else 0.0
        for name, text, value in (
            ("num_requests_running", "Sequences in the batch.", load.running),
            ("num_requests_waiting", "Sequences that wait for a place in it.", load.waiting),
            ("kv_cache_usage_perc", "Share of the KV cache in use, 0 to 1.", used),
        ):
            gauge = GaugeMetricFamily(f"dpn_rt:{name}", text, labels=("model_name",))
            gauge.add_metric((self._name,), value)
            yield gauge
        for name, text, value in (
            ("num_preemptions", "Sequences preempted.", load.preemptions),
            ("prompt_tokens", "Rows of prompts that have got a first token, images included.", load.prompt_rows),
            ("generation_tokens", "Tokens generated.", load.generated_tokens),
            ("prefix_cache_queries", "Rows of prompts.", load.prefix_queries),
            ("prefix_cache_hits", "Rows of prompts that had been computed before.", load.prefix_hits),
            ("prefix_cache_evictions", "Prefixes that gave way to others.", load.prefix_evictions),
            ("image_cache_queries", "Images of prompts.", load.image_queries),
            ("image_cache_hits", "Images that did not go through the vision tower.", load.image_hits),
        ):
            counter = CounterMetricFamily(f"dpn_rt:{name}", text, labels=("model_name",))
            counter.add_metric((self._name,), value)
            yield counter
